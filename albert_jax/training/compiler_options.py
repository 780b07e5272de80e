"""Options for the compiler, each with its reason: the one place, for `train` and `compile` alike.

They travel with the program (`Lowered.compile(compiler_options)`), so no environment variable has
to be set on any host. Whatever is not here is libtpu's default, its latency hiding and its
asynchronous collectives among them: the step has none inside a loop that could be hidden better.
"""

# By the beginning of `device_kind`. For xxlarge on v6e, which waits for its memory, 64 MiB of its
# 128 take the compiler's estimate of the step from 286 to 246 ms. On v5e 96 MiB were worth 5 % of
# an earlier step, at four times the compile time: left out.
_SCOPED_VMEM_KIB = {"TPU v6": 65_536}


def compiler_options(device_kind: str) -> dict[str, str]:
    """Options for programs on this kind of device; none for what is not a TPU.

    xla_tpu_scoped_vmem_limit_kib: how much of its fast memory one fused operation may fill. With
    more than the default, products keep larger blocks of weights and activations there and move
    less.
    """
    for kind, limit in _SCOPED_VMEM_KIB.items():
        if device_kind.startswith(kind):
            return {"xla_tpu_scoped_vmem_limit_kib": str(limit)}
    return {}
