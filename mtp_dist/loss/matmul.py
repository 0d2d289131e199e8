"""Matrix products whose result is more precise than their factors."""

from torch import Tensor, addmm, mm


def matmul_into(result: Tensor, left: Tensor, right: Tensor) -> None:
    """result = left @ right, in the result's precision."""
    if left.dtype == result.dtype:
        mm(left, right, out=result)
    elif result.is_cuda:
        mm(left, right, out_dtype=result.dtype, out=result)
    else:  # PyTorch has no such product on the CPU
        mm(left.to(result.dtype), right.to(result.dtype), out=result)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
