"""A device in the host's memory that writes down when the host waits for it.

Its tensors say that they are on "meta" and have values all the same, in tensors of the CPU, with which they
are computed. So the code runs as it does beside a GPU, and what it computes can be compared. A wait is what
would be one on a GPU: a value, or a number of values, that the host asks for, and a copy from or to memory
that is not pinned. The kernels that CPUs lack are written down from their documentation.
"""

from __future__ import annotations

import itertools
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from mssr.models.attention import _by_segment

DEVICE = torch.device("meta")
aten = torch.ops.aten
ASKS = {
    # A value.
    "_local_scalar_dense", "item", "equal", "is_nonzero", "allclose", "_assert_scalar",
    # How many values there are.
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "masked_scatter_backward", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc", "one_hot",
    "repeat_interleave", "segment_reduce", "embedding_renorm_", "nanmedian", "combinations",
}  # fmt: skip
"""Operations of which the result, or its size, is not known before the device has come so far."""


class OnDevice(torch.Tensor):
    """A tensor on the device.

    Attributes:
        value: the same on the CPU.
    """

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> OnDevice:
        options: Any = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        options |= {"dtype": value.dtype, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, **options)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's does not know it

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on the device outside of StandIn()")


class StandIn(TorchDispatchMode):
    """Inside, the device is there.

    Attributes:
        waits: for each time that the host waited, the operation and from where it was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        # Tensors in pinned memory, kept so that no other gets the same memory.
        self._pinned: dict[int, torch.Tensor] = {}

    def put(self, module: torch.nn.Module) -> None:
        """Parameters and buffers of a module on the device."""
        moved: dict[int, Any] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, t in tensors.items():
                    if t is not None and id(t) not in moved:  # tied ones are one
                        new: Any = OnDevice(t.detach().clone())
                        if isinstance(t, torch.nn.Parameter):
                            new = torch.nn.Parameter(new, requires_grad=t.requires_grad)
                        moved[id(t)] = new, t
                    if t is not None:
                        tensors[name] = moved[id(t)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        from_device = any(isinstance(t, OnDevice) for t in tensors)
        if not from_device and kwargs.get("device") != DEVICE:
            return self._on_host(func, name, args, kwargs)
        # torch.tensor(..., device=DEVICE), which copies and waits, hides from modes.
        assert all(isinstance(t, OnDevice) or not t.is_meta for t in tensors), "torch.tensor"
        self._look(func, name, args, kwargs, tensors)
        to_host = False
        if kwargs.get("device") is not None:
            to_host = torch.device(kwargs["device"]).type == "cpu"
            kwargs["device"] = torch.device("cpu")
            kwargs.pop("pin_memory", None)
        inner, options = tree_map_only(OnDevice, lambda t: t.value, (args, kwargs))
        out = KERNELS.get(func, func)(*inner, **options)
        if to_host:
            return out
        if name == "copy_" and not isinstance(args[0], OnDevice):
            return args[0]
        out = tree_map_only(torch.Tensor, OnDevice, out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _on_host(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "is_pinned":
            return args[0].data_ptr() in self._pinned
        if name == "_pin_memory":
            pinned = args[0].clone()
            self._pinned[pinned.data_ptr()] = pinned
            return pinned
        return func(*args, **kwargs)

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        """Write down what waits."""
        if name in ("_to_copy", "copy_"):
            into, source = args[:2] if name == "copy_" else (None, args[0])
            to_host = (kwargs.get("device") or DEVICE) != DEVICE
            to_host |= into is not None and not isinstance(into, OnDevice)
            if not to_host and isinstance(source, OnDevice):
                return
            blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            on_host = into if to_host else source
            if blocks or on_host is None or on_host.data_ptr() not in self._pinned:
                self._wait(f"copy {'from' if to_host else 'to'} the device")
            return
        sized = kwargs.get("output_size") is not None or kwargs.get("unsafe") is True
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        fills = name.startswith("index_put") and args[2].numel() == 1  # becomes masked_fill
        sized |= name == "histc" and args[2:3] < args[3:4]  # else it looks for the least and the largest
        if name in ASKS and not sized:
            self._wait(name)
        elif not fills and any(m is not None and m.dtype in (torch.bool, torch.uint8) for m in masks):
            self._wait(f"{name} by a mask")
        elif not name.startswith("new_") and any(t.dim() and not isinstance(t, OnDevice) for t in tensors):
            self._wait(f"{name} of tensors here and there")

    def _wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
        ours = [f for f in frames if not f.filename.endswith("stand_in_device.py")]
        self.waits.append(f"{what}: {ours[-1].filename}:{ours[-1].lineno}" if ours else what)


def _narrow_product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    assert a.dtype == b.dtype != out_dtype == torch.float32
    return a.to(out_dtype) @ b.to(out_dtype)


def _add_narrow_product(
    base: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    assert base is out and out.dtype == out_dtype
    return out.add_(_narrow_product(a, b, out_dtype))


def _attend(
    q: Any, k: Any, v: Any, starts: Any, same: Any, max_q: int, max_k: int, causal: bool = False,
    scale: float | None = None, window: Any = None, grouped: bool = False,
) -> Any:  # fmt: skip
    lengths = starts.diff()
    assert starts.dtype == torch.int32 and max_q == max_k == int(lengths.max()) and starts[-1] == len(q)
    assert window == ([-1, 0] if causal else [-1, -1]) and grouped == (q.shape[1] != k.shape[1])
    out = _by_segment(q, k, v, starts.tolist(), causal, scale)
    return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _attend_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, starts: Any, *rest: Any) -> Any:
    causal, scale = rest[3], rest[5]  # after it: the window

    def work() -> Any:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        result = _by_segment(*inputs, starts.tolist(), causal, scale)
        return torch.autograd.grad(result, inputs, grad)

    with ThreadPoolExecutor(1) as thread:  # here autograd is off
        return thread.submit(work).result()


def _count_whole_numbers(values: torch.Tensor, *bins: Any) -> torch.Tensor:
    return torch.histc(values.double(), *bins).to(values.dtype)


def _multiply_groups(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows of ``a`` times matrices of ``b``; or, where neither has several, columns times rows."""
    assert ends.dtype == torch.int32 and a.dim() == 2
    bounds = [0, *ends.tolist()]
    groups = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    if b.dim() == 2:
        return torch.stack([a[:, group] @ b[group] for group in groups])
    return torch.cat([a[group] @ b[k] for k, group in enumerate(groups)])


KERNELS = {
    aten._grouped_mm.default: _multiply_groups,
    aten.histc.default: _count_whole_numbers,
    aten.mm.dtype: _narrow_product,
    aten.addmm.dtype_out: _add_narrow_product,
    torch.ops.torch_attn._varlen_attn.default: _attend,
    torch.ops.torch_attn._varlen_attn_backward.default: _attend_backward,
}
