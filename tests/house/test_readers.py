"""Every call that can run what it reads, or be hurt by it, stands in docs/readers.md with the reason why it is safe."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "finetune"
PAGE = ROOT / "docs" / "readers.md"

# Full names of functions and classes, as regular expressions. Exceptions, writers and types are no readers.
WATCHED = (
    # runs text or a name as code
    *(r"eval", r"exec", r"compile", r"__import__", r"importlib\.(import_module|reload|util\..*)", r"runpy\..*"),
    *(r"pkgutil\..*", r"code\..*", r"ctypes(\..*)?", r"cffi(\..*)?", r"torch\.(ops|classes)\.load_library"),
    *(
        r"subprocess\..*",
        r"os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|startfile)",
        r"pty\..*",
        r"shell=(?!False).*",
    ),
    *(r"(allow_pickle|trust_remote_code)=(?!False).*", r"weights_only=(?!True).*", r"from .* import \*", r"getattr:.*"),
    # pickles and programs in files
    *(r"c?[Pp]ickle\.(?!\w*Error$).*", r"(dill|cloudpickle|joblib|shelve|marshal|copyreg)\..*", r"pickletools\..*"),
    *(
        r"torch\.(load|from_file|package\..*|export\..*|hub\.(?!get_dir$).*|utils\.cpp_extension\..*)",
        r"torch\.jit(\..*)?",
    ),
    *(r"torch\.serialization\.(?!\w*Error$).*", r"(aoti|onnx|onnxruntime|tensorrt)\w*\..*"),
    # arrays, archives, compressed files
    *(r"numpy\.(load|loadtxt|genfromtxt|fromfile|fromregex|memmap)", r"numpy\.lib\..*", r"scipy\.io\..*", r"h5py\..*"),
    *(r"zipfile\.(ZipFile|is_zipfile|Path|PyZipFile)", r"tarfile\.(open|TarFile|is_tarfile)(\..*)?", r"gzip\..*"),
    *(
        r"bz2\..*",
        r"lzma\..*",
        r"zlib\.decompress\w*",
        r"(zstandard|zstd|lz4|compression)\..*",
        r"shutil\.unpack_archive",
    ),
    *(r".*\.(extract|extractall)", r"mmap\.mmap"),
    # texts with a grammar
    *(
        r"yaml\.\w*(load|compose|parse|scan|Loader)\w*",
        r"json\.(load|loads|JSONDecoder)",
        r"msgspec\.(convert|.*decode.*)",
    ),
    *(r"csv\.(reader|DictReader)", r"ast\.(literal_eval|parse)", r"(tomllib|toml|configparser|sqlite3|plistlib)\..*"),
    *(r"xml\..*", r"lxml\..*", r"html\.parser\..*", r"pandas\..*", r"pyarrow(\..*)?", r"pq\..*"),
    # pictures and fonts
    *(
        r"PIL\.Image\.open",
        r"PIL\.ImageFont\.(truetype|load\w*)",
        r"PIL\.ImageFile\.Parser",
        r"torchvision\.io\.(?!ImageReadMode).*",
    ),
    *(r"cv2\..*", r"imageio\..*"),
    # weights, data sets and tokenizers, and libraries that read them for us
    *(
        r"safetensors\.(?!\w*Error$)(.*\.)?(safe_open|load\w*|deserialize)",
        r".*\.(from_pretrained|get_state_dict|load_pretrained)",
    ),
    *(
        r"open_clip\.(?!get_model_config).*(create|load|download|get_tokenizer|_find_checkpoint).*",
        r"open_clip\.tokenizer\..*",
    ),
    *(
        r"open_clip\.(model|coca_model)\.(CLIP|CustomTextCLIP|CoCa|_build_vision_tower)",
        r"timm\.(create_model|models\..*(load|hub).*)",
    ),
    *(
        r"timm\..*(load_|_hub).*",
        r"huggingface_hub\.(?!constants|errors).*",
        r"transformers\..*",
        r"datasets\.\w*load\w*",
    ),
    *(r"torchvision\.datasets(\..*)?", r"sklearn\.datasets\..*"),
    # networks
    *(
        r"urllib\.request\.(urlopen|urlretrieve|build_opener|Request)",
        r"(requests|httpx|aiohttp|ftplib|http\.client)\..*",
    ),
    *(r"fsspec\..*", r"socket\.(socket|create_connection|create_server)"),
    # Hydra and OmegaConf can call what a yaml file names
    *(r"hydra\.(?!errors|core|types|plugins).*", r"hydra\.utils\..*", r"hydra\.core\.plugins\..*"),
    r"omegaconf\.OmegaConf\.(load|create|select|resolve|to_container|to_yaml|register_\w*)",
)
_IS_WATCHED = re.compile("|".join(f"(?:{pattern})" for pattern in WATCHED))


# What only looks like one: exceptions, constants, versions.
_IS_HARMLESS = re.compile(r".*\.(\w*(Error|Exception)|__\w+__(\..*)?)|subprocess\.[A-Z]+")


def readers(source: str) -> set[tuple[str, str]]:
    """(function, full name) of every use of a watched name; `module` for those outside functions."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            pairs = [(name.asname, name.name) for name in node.names]
            imported |= {
                alias or name.partition(".")[0]: name if alias else name.partition(".")[0] for alias, name in pairs
            }
        elif isinstance(node, ast.ImportFrom):
            imported |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    used = {(place, name) for place, name in _names(tree, "module", imported)}
    return {(place, name) for place, name in used if _IS_WATCHED.fullmatch(name) and not _IS_HARMLESS.fullmatch(name)}


def _names(node: ast.AST, place: str, imported: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(function, full name) of every name that is read, the longest only: `a.b.c`, not `a.b`. Types are left out."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        place = node.name if place == "module" else f"{place}.{node.name}"
    if isinstance(node, (ast.Attribute, ast.Name)) and (name := _full_name(node, imported)):
        if isinstance(node.ctx, ast.Load):
            yield place, name
        return
    if isinstance(node, ast.ImportFrom) and any(name.name == "*" for name in node.names):
        yield place, f"from {node.module} import *"
    if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "weights_only", "trust_remote_code"):
        yield place, f"{node.arg}={ast.unparse(node.value)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        of = _full_name(node.args[0], imported) or ""
        if of.partition(".")[0] in {full.partition(".")[0] for full in imported.values()}:
            word = node.args[1].value if isinstance(node.args[1], ast.Constant) else "*"
            yield place, f"getattr:{of}" if word == "*" else f"{of}.{word}"
    types = ("annotation", "returns")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in types:
                yield from _names(child, place, imported)


def _full_name(node: ast.AST, imported: dict[str, str]) -> str | None:
    """`np.lib.format` -> `numpy.lib.format`; None where it begins with something else than a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([imported.get(node.id, node.id), *parts[::-1]]) if isinstance(node, ast.Name) else None


def found() -> set[tuple[str, str]]:
    """(`file.py:function`, full name) in the whole package."""
    every = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        every |= {(f"{name}:{place}", call) for place, call in readers(path.read_text(encoding="utf-8"))}
    return every


def listed() -> dict[tuple[str, str], str]:
    """The rows of docs/readers.md: (place, full name) -> reason."""
    rows = re.findall(r"^\| `([^`|]+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {(place, call): reason for place, calls, reason in rows for call in re.findall(r"`([^`]+)`", calls)}


def test_every_reader_is_listed_with_its_reason() -> None:
    now, known = found(), listed()
    new, gone = now - known.keys(), known.keys() - now
    assert not new, f"say in docs/readers.md why these are safe: {sorted(new)}"
    assert not gone, f"docs/readers.md lists what is gone: {sorted(gone)}"
    assert all(len(reason.split()) > 3 for reason in known.values())


def test_nothing_runs_what_it_reads() -> None:
    """Readers that have no safe way of use stand nowhere in the package; the one shell runs what the user typed."""
    forbidden = r"eval|exec|compile|__import__|torch\.jit.*|c?[Pp]ickle\..*|(dill|joblib|shelve|marshal)\..*|os\..*"
    forbidden += (
        r"|yaml\.(unsafe|full).*|hydra\.utils\..*|torch\.package\..*|allow_pickle.*|weights_only.*|trust_remote.*"
    )
    assert [reader for reader in sorted(found()) if re.fullmatch(forbidden, reader[1])] == []
    assert [place for place, call in found() if call.startswith("shell=")] == ["data/sources/fetching.py:_run_command"]


def test_readers_of_files_are_told_to_run_nothing() -> None:
    """The safe option of each reader is written out, so that another default of the library changes nothing."""
    options = {
        "torch.load": "weights_only=True",
        "numpy.load": "allow_pickle=False",
        "get_state_dict": "weights_only=True",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func).replace("np.", "numpy.") if isinstance(node, ast.Call) else ""
            wanted = next(
                (option for call, option in options.items() if name == call or name.endswith(f".{call}")), None
            )
            given = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords] if wanted else []
            assert wanted is None or wanted in given, f"{path.name}, line {node.lineno}: {name} without {wanted}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.load(x)", "torch.load"),
        ("from torch import load as get\nget(x)", "torch.load"),
        ("import torch as t\nread = t.jit.load", "torch.jit.load"),
        ("from torch import jit\njit.load(x)", "torch.jit.load"),
        ("import torch\ngetattr(torch, 'load')(x)", "torch.load"),
        ("import torch\ngetattr(torch, name)(x)", "getattr:torch"),
        ("from functools import partial\nimport yaml\npartial(yaml.unsafe_load, x)", "yaml.unsafe_load"),
        ("import numpy as np\nnp.load(x, allow_pickle=safe)", "allow_pickle=safe"),
        ("import torch\ntorch.load(x, weights_only=False)", "weights_only=False"),
        ("import subprocess\nsubprocess.run(x, shell=flag)", "shell=flag"),
        ("import os\nos.system(x)", "os.system"),
        ("from pickle import *\nloads(x)", "from pickle import *"),
        ("import pickle\nclass Reader(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import tarfile\nwith tarfile.open(x) as tar: tar.extractall()", "tar.extractall"),
        ("import torch\ndef f(read=torch.hub.load): pass", "torch.hub.load"),
        ("import hydra\nhydra.utils.instantiate(x)", "hydra.utils.instantiate"),
        (
            "from omegaconf import OmegaConf\nOmegaConf.register_new_resolver('x', y)",
            "omegaconf.OmegaConf.register_new_resolver",
        ),
        ("x = [eval(y) for y in z]", "eval"),
        ("import importlib\nimportlib.import_module(x)", "importlib.import_module"),
        ("from PIL import Image\nImage.open(x)", "PIL.Image.open"),
        (
            "import transformers\ntransformers.AutoTokenizer.from_pretrained(x)",
            "transformers.AutoTokenizer.from_pretrained",
        ),
    ],
)
def test_a_reader_is_found_however_it_is_written(source: str, name: str) -> None:
    assert name in {call for _, call in readers(source)}


def test_what_is_no_reader_is_left_out() -> None:
    source = "import pickle, subprocess\ndef f(p: subprocess.Popen) -> subprocess.Popen:\n  compile = 1\n"
    source += "  try: g(subprocess.DEVNULL, weights_only=True, shell=False)\n  except pickle.UnpicklingError: pass"
    assert readers(source) == set()
