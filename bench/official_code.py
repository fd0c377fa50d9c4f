"""Official code of MInference, FlexPrefill and XAttention, imported from checkouts for ``bench/official_prefill.py``.

Only the files that hold the kernels and the choice of what to attend to are imported. Packages that these files ask
for at import and that no timed path uses (transformers, vLLM, flash-attn, other methods of the same repository) are
replaced by empty modules while they are imported.
"""

import contextlib
import ctypes
import importlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCK = 64  # tokens of a block of MInference
NEVER = 2**30


def load_minference(root: Path) -> tuple[Any, str]:
    """Return MInference's ``minference_forward`` module, and how it makes blocks of columns and slashes.

    Its compiled extension is replaced by the same CUDA kernel, built here from the checkout, or without a compiler by
    ``convert_in_torch``.
    """
    import torch

    try:
        convert, how = build_conversion(root / "csrc" / "vertical_slash_index.cu"), "official CUDA kernel"
    except (OSError, ValueError, subprocess.SubprocessError) as problem:
        sys.stderr.write(f"MInference's conversion was not built, so it is not timed: {problem}\n")
        convert, how = convert_in_torch, "torch code of bench/, not timed"
    unused = {name: None for name in ("flexprefill_forward", "quest_forward")}
    stubs = {
        **_packages("minference", root / "minference", ("ops", "modules")),
        "minference.cuda": _module("minference.cuda", convert_vertical_slash_indexes=convert),
        **{f"minference.modules.{name}": _module(name, torch=torch, math=math, **unused) for name in _OTHER_METHODS},
    }
    return _load("minference.modules.minference_forward", stubs), how


_OTHER_METHODS = ("flexprefill", "kvcompression", "quest", "snapkv")


def load_flexprefill(root: Path) -> Any:
    """Return FlexPrefill's module of kernels, told that it runs on an H100: it has no setting for an H200."""
    stubs = _packages("flex_prefill", root / "flex_prefill", ("ops",))
    module = _load("flex_prefill.ops.flex_prefill_attention", stubs)
    module.GPU_NAME = "h100"
    return module


def load_xattention(root: Path) -> Any:
    """Return XAttention's module; a copy of it that takes the Triton path on this device, which it does not know."""
    folder = Path(tempfile.mkdtemp()) / "xattn"
    shutil.copytree(root / "xattn" / "src", folder / "src")
    file, test = folder / "src" / "Xattention.py", '"100" not in torch.cuda.get_device_properties'
    source = file.read_text(encoding="utf-8")
    if test not in source:
        raise ValueError(f"{file} has no {test!r}")
    file.write_text(source.replace(test, '"H" not in torch.cuda.get_device_properties'), encoding="utf-8")
    stubs = _packages("xattn", folder, ("src",))
    return _load("xattn.src.Xattention", stubs | {"block_sparse_attn": _module("b", block_sparse_attn_func=None)})


def _load(name: str, stubs: dict[str, ModuleType]) -> Any:
    shared = {
        "transformers": _module("transformers"),
        "transformers.models": _module("transformers.models"),
        "transformers.models.llama": _module("transformers.models.llama"),
        "transformers.models.llama.modeling_llama": _module("modeling_llama", rotate_half=None),
        "transformers.utils": _module("transformers.utils", is_flash_attn_2_available=lambda: False),
        "transformers.utils.import_utils": _module("import_utils", _is_package_available=lambda name: False),
        "flash_attn": _module("flash_attn", flash_attn_func=None),
    }
    with _stubbed(shared), contextlib.redirect_stdout(sys.stderr):
        sys.modules.update(stubs)
        return importlib.import_module(name)


def _packages(name: str, folder: Path, parts: tuple[str, ...]) -> dict[str, ModuleType]:
    """Return a package and parts of it without what their ``__init__`` files import."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    found = {name: _module(name, __path__=[str(folder)])}
    return found | {f"{name}.{part}": _module(f"{name}.{part}", __path__=[str(folder / part)]) for part in parts}


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


@contextlib.contextmanager
def _stubbed(stubs: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def build_conversion(source: Path) -> Callable[..., Any]:
    """Return MInference's conversion of columns and slashes, its kernel and launch compiled by nvcc without PyTorch."""
    import torch

    text = source.read_text(encoding="utf-8")
    begin, end = text.index("__device__ void save_blocks"), text.index("std::vector<at::Tensor> convert")
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        raise FileNotFoundError("nvcc")
    folder = Path(tempfile.mkdtemp())
    (folder / "conversion.cu").write_text("#include <cuda_runtime.h>\n" + text[begin:end] + _ENTRY, encoding="utf-8")
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    command = [compiler, "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", "-o", "conversion.so"]
    done = subprocess.run([*command, "conversion.cu"], cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(done.stderr[-2000:])
    library = ctypes.CDLL(str(folder / "conversion.so"))

    def convert(seqlens, vertical, slash, context_size, block_size_m, block_size_n):
        shape = (*slash.shape[:2], -(-context_size // block_size_m))
        wide = ((), (slash.shape[2],), (), (vertical.shape[2],))
        made = [torch.zeros((*shape, *last), dtype=torch.int32, device=slash.device) for last in wide]
        given = [seqlens.contiguous(), vertical.contiguous(), slash.contiguous()]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*given, *made)]
        sizes = [ctypes.c_int(size) for size in (*shape, vertical.shape[2], slash.shape[2])]
        status = library.convert_on_device(*pointers, *sizes)
        if status:
            raise RuntimeError(f"the conversion of columns and slashes failed with CUDA error {status}")
        return made

    return convert


_ENTRY = """
extern "C" int convert_on_device(const int* seqlens, const int* vertical, const int* slash, int* block_count,
    int* block_offset, int* column_count, int* column_index, int batch, int heads, int rows, int nnz_v, int nnz_s) {
    convert_vertical_slash_indexes_64x64(seqlens, vertical, slash, block_count, block_offset, column_count,
        column_index, batch, heads, rows, nnz_v, nnz_s);
    return (int)cudaGetLastError();
}
"""


def convert_in_torch(seqlens, vertical, slash, context_size, block_size_m, block_size_n) -> list[Any]:
    """Return the counts and starts of the blocks, and the counts and ids of the other columns, of each row of blocks.

    The same lists as those of MInference's kernel, which merges slashes one after the other: a slash opens a block of
    its own where it begins behind the last one, and else adds the next one where it ends behind it.

    Args:
        vertical: ``[1, H, V]``, ascending.
        slash: ``[1, H, S]``, distances from the diagonal, descending.
    """
    import torch

    heads, device = slash.shape[1], slash.device
    rows = -(-context_size // BLOCK)
    end = (torch.arange(rows, device=device) + 1) * BLOCK
    last = torch.full((heads, rows), -NEVER, device=device)
    count = torch.zeros_like(last)
    starts = torch.full((heads, rows, slash.shape[2] + 1), NEVER, dtype=torch.int32, device=device)
    spare = torch.full_like(count, slash.shape[2])
    for offset in slash[0].long().unbind(1):
        stop = (end - offset[:, None]).clamp(min=BLOCK)
        opens = (offset[:, None] < end) & (stop > last + BLOCK)
        adds = (offset[:, None] < end) & (stop > last) & ~opens
        start = torch.where(opens, stop - BLOCK, last)
        place = torch.where(opens | adds, count, spare)
        starts.scatter_(2, place[..., None], start[..., None].int())
        last = torch.where(opens | adds, start + BLOCK, last)
        count += opens | adds
    starts = starts[..., :-1].contiguous()
    columns = vertical[0][:, None].expand(heads, rows, -1).contiguous()
    before = torch.searchsorted(starts, columns, right=True) - 1
    found = starts.gather(2, before.clamp(min=0))
    kept = ~((before >= 0) & (columns < found + BLOCK)) & (columns < last[..., None])
    order = torch.argsort((~kept).byte(), dim=2, stable=True)
    column_count = kept.sum(2)
    listed = torch.arange(columns.shape[2], device=device) < column_count[..., None]
    columns = torch.where(listed, columns.gather(2, order), 0)
    starts = torch.where(starts == NEVER, 0, starts)
    return [part[None].int() for part in (count, starts, column_count, columns)]


def choose_together(q, k, vertical: int = 1000, slash: int = 6096) -> tuple[Any, Any]:
    """Return the columns and slashes that MInference chooses head by head, for all heads at a time.

    Args:
        q: ``[B, H, T, D]``; the last 64 are looked at.
        k: ``[B, H, T, D]``.
    """
    import torch

    batch, heads, tokens, dim = q.shape
    last = min(BLOCK, tokens)
    scores = torch.matmul(q[:, :, -last:], k.transpose(2, 3)) / math.sqrt(dim)
    hidden = torch.ones(last, last, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -last:].masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    columns = weights.sum(2)
    columns[..., :30] = torch.inf
    width = tokens + last
    padded = torch.nn.functional.pad(weights, (last, 0))
    strides = (heads * last * width, last * width, width + 1, 1)
    diagonals = padded.as_strided((batch, heads, last, tokens), strides, 1).sum(2)
    diagonals[..., -100:] = torch.inf
    distances = tokens - 1 - torch.topk(diagonals, min(tokens, slash), -1).indices
    return torch.topk(columns, min(tokens, vertical), -1).indices, distances
