"""What a sync should cost, from bytes, rate and delay: a straight line, to be held against the measurement."""

from __future__ import annotations

import math

from lib.bench import NUM_PARAMETERS
from lib.network_job import COMPRESSIONS, OVERLAPS

from hf_edit.method.compression import bytes_per_element

NUM_UNITS = 10  # of the benchmarks' Llama: embeddings, 8 blocks, norm with head; an all-reduce each
FORWARD_SHARE = 1 / 3  # of a step's computation; backward is the rest
PROTOCOL_OVERHEAD = 0.05  # Ethernet, IP and TCP headers around 1448 bytes, acknowledgements
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def bits_per_second(rate: str) -> float:
    """A rate as `tc` writes it; "unlimited" is infinite.

    >>> bits_per_second("100mbit"), bits_per_second("unlimited")
    (100000000.0, inf)
    """
    if rate == "unlimited":
        return math.inf
    number = rate.removesuffix("bit")
    scale = number[-1:] if number[-1:] in ("k", "m", "g") else ""
    try:
        if number == rate:
            raise ValueError
        return float(number.removesuffix(scale)) * UNITS[scale]
    except ValueError:
        raise ValueError(f"rate {rate!r}: give one as tc writes it, such as 100mbit or 1gbit, or unlimited") from None


def bytes_of_sync(compression: str = "none", num_replicas: int = 2) -> float:
    """That a host sends in one sync of the benchmarks' Llama."""
    return bytes_per_element(compression) * NUM_PARAMETERS * 2 * (num_replicas - 1) / num_replicas


def rate_of(rho: float, tau: int, step_seconds: float) -> str:
    """The rate, as `tc` writes it, at which a host's bytes of one uncompressed sync take `rho` times as long as its
    `tau` inner steps.

    >>> rate_of(1.0, 32, 0.25)[-4:]
    'kbit'
    """
    return f"{round(8 * bytes_of_sync() / (rho * tau * step_seconds) / 1000)}kbit"


def expected_share(
    *,
    compute_seconds: float,
    sent_bytes: float,
    bits_per_second: float,
    latency_seconds: float = 0.0,
    hidden_seconds: float = 0.0,
    overhead: float = PROTOCOL_OVERHEAD,
) -> float:
    """The share of the unsynchronised throughput that is left: compute / (compute + exposed).

    exposed = max(0, 8 sent_bytes (1 + overhead) / bits_per_second + latency_seconds - hidden_seconds).

    Args:
        compute_seconds: computation of one interval.
        sent_bytes: what a host sends in one sync.
        latency_seconds: time that the sync's messages are on their way one after the other.
        hidden_seconds: computation that runs beside the sync.

    A sync of 33.6 MB at 100 Mbit/s takes 2.82 s; 32 steps of 0.25 s take 8 s:

    >>> cost = dict(compute_seconds=8.0, sent_bytes=33.6e6, bits_per_second=1e8)
    >>> round(expected_share(**cost), 3)
    0.739
    >>> expected_share(**cost, hidden_seconds=4.0)
    1.0
    """
    communication_seconds = 8 * sent_bytes * (1 + overhead) / bits_per_second + latency_seconds
    exposed_seconds = max(0.0, communication_seconds - hidden_seconds)
    return compute_seconds / (compute_seconds + exposed_seconds)


def expected_of_method(
    method: str,
    *,
    step_seconds: float,
    tau: int | None,
    delay_steps: int,
    rate: str,
    delay_milliseconds: float,
    num_replicas: int = 2,
) -> float:
    """`expected_share` of one of the benchmarks' methods on their Llama.

    Every sync all-reduces the parameters, or as many gradients; an all-reduce sends 2 (R-1)/R times its size and
    takes 2 (R-1) messages one after the other; the units' run one after the other, after one more for the exchange of
    norms. HSDP does so in every step, beside the backward pass.

    Args:
        step_seconds: of one inner step.
        tau: inner steps of an interval; not looked at for HSDP.
        delay_milliseconds: of the network, one way.

    >>> slow = dict(step_seconds=0.25, delay_steps=16, rate="100mbit", delay_milliseconds=0.0)
    >>> methods = ("edit-none", "edit-forward", "edit-delayed")
    >>> [round(expected_of_method(method, tau=32, **slow), 3) for method in methods]
    [0.739, 0.745, 1.0]
    >>> round(expected_of_method("hsdp", tau=None, **slow), 2)
    0.09
    """
    synchronous = method == "hsdp"
    interval_steps = 1 if synchronous or tau is None else tau
    rounds = 2 * (num_replicas - 1) * (NUM_UNITS + (not synchronous))
    hidden_steps = {"none": 0.0, "forward": FORWARD_SHARE, "delayed": float(delay_steps)}
    return expected_share(
        compute_seconds=interval_steps * step_seconds,
        sent_bytes=bytes_of_sync(COMPRESSIONS.get(method, "none"), num_replicas),
        bits_per_second=bits_per_second(rate),
        latency_seconds=rounds * delay_milliseconds / 1000,
        hidden_seconds=step_seconds * (1 - FORWARD_SHARE if synchronous else hidden_steps[OVERLAPS[method]]),
    )
