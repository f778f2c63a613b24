"""Fused Triton kernels; same stem as the op they serve. Installs as `bptoolkit.triton_kernels`."""

if __name__ == "triton_kernels":
    raise ImportError("this folder is bptoolkit.triton_kernels, not triton-lang's package of that name")
