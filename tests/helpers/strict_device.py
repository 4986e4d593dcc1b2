"""A device without hardware, for tests: it computes on the CPU, but mixes with CPU tensors no more than CUDA does.

`register` makes it known to torch, for good, under the name of `NAME`. So it is for processes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


NAME = "strict"
aten = torch.ops.aten
# What may take tensors of two devices, as with CUDA: copies, indices on the CPU, and numbers on the CPU that stand in
# tensors of no dimensions, as in whatever works element by element.
COPIES = {aten.copy_, aten._to_copy}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
WITH_NUMBER = INDEXING | {
    aten.masked_fill,
    aten.masked_fill_,
    aten.fill,
    aten.fill_,
    aten.index_fill,
    aten.index_fill_,
}
# What of a tensor is no operator: what is asked of a copy on the CPU, and of the memory.
OF_COPY = {Tensor.tolist, Tensor.__repr__, Tensor.__reduce_ex__}
OF_MEMORY = {Tensor.storage, Tensor.untyped_storage, Tensor.data_ptr}


class StrictTensor(Tensor):
    """A tensor of the device; `held` is the CPU tensor that has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> StrictTensor:
        with torch.inference_mode(False):  # which would refuse to make views of others
            wrapper = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device(NAME, 0),
            )
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What comes to no `__torch_dispatch__`; the rest is let through."""
        if func in OF_COPY:
            return func(args[0].cpu(), *args[1:], **(kwargs or {}))
        if func in OF_MEMORY:
            return func(args[0].held)
        if func is Tensor.numpy:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is called while {NAME}:0 is not entered")


class StrictDevice(TorchDispatchMode):
    """The device, while it is entered: all operators come here, those that make tensors included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode, torch does not take it apart by itself
                return func.decompose(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_strict = any(isinstance(tensor, StrictTensor) for tensor in given)
        if is_strict:
            refuse_mixtures(func, args, given)
        makes_strict = is_strict
        if (device := kwargs.get("device")) is not None:
            makes_strict = torch.device(device).type == NAME
            kwargs = {**kwargs, "device": torch.device("cpu") if makes_strict else device}
        held_args, held_kwargs = tree_map_only(StrictTensor, lambda tensor: tensor.held, (args, kwargs))
        output = func(*held_args, **held_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if not makes_strict or func is aten._local_scalar_dense.default:  # `item`
            return output
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, StrictTensor, output))


def refuse_mixtures(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise where CUDA would, because a tensor on the CPU meets one on the device.

    Args:
        func: An operator.
        args: Its positional arguments.
        given: All tensors among its arguments.

    Raises:
        RuntimeError: They meet.
    """
    packet = func.overloadpacket
    if packet in COPIES:
        return
    on_cpu = [tensor for tensor in given if not isinstance(tensor, StrictTensor)]
    is_into_cpu = func._schema.is_mutable and any(args[0] is tensor for tensor in on_cpu)
    if packet in INDEXING and not any(args[0] is tensor for tensor in on_cpu):
        on_cpu = [tensor for tensor in on_cpu if not any(tensor is index for index in args[1])]
    if (torch.Tag.pointwise in func.tags or packet in WITH_NUMBER) and not is_into_cpu:
        on_cpu = [tensor for tensor in on_cpu if tensor.dim() > 0]
    if on_cpu:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in on_cpu)
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} got some on {NAME}:0 and some on cpu: {shapes}"
        )


class Backend(_DummyBackendModule):
    """`torch.strict`; numbers are drawn on the CPU, so the random state is the CPU's."""

    def get_rng_state(self, device: Any = NAME) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = NAME) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def register() -> StrictDevice:
    """Make the device known to torch, before the first backward pass. It works while what is returned is entered."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` moves what it has made with an operator of ours
    torch.__future__.set_swap_module_params_on_conversion(True)  # keeps tied parameters of a moved model tied
    torch.accelerator.synchronize = lambda device=None: None
    return StrictDevice()
