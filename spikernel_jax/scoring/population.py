"""Many candidates at once: the training-free score of a population, under common random numbers.

All candidates draw their operations from one shared bank of random weights and see the same images, so
most of the noise of a draw is common to all and cancels where they are compared. R banks and R batches
give R replicates of each score, and so its standard error.
"""

from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.scoring import choice
from spikernel_jax.scoring.replicates import Scores, over_replicates
from spikernel_jax.scoring.room import Device
from spikernel_jax.scoring.scorer import LARGEST_CHUNK, Scorer
from spikernel_jax.snn import network
from spikernel_jax.snn.cost import checked_genotypes
from spikernel_jax.snn.spec import NetworkSpec


def some_genotypes(spec: NetworkSpec, genotypes: ArrayLike) -> NDArray[np.int8]:
    """Genotypes to score, as `checked_genotypes`; ValueError where there are none, too."""
    rows = checked_genotypes(spec, genotypes)
    if not len(rows):
        raise ValueError(f"genotypes have shape {rows.shape}; want [n, E] or [n, 2, E] with n >= 1")
    return rows


def score_population(
    genotypes: ArrayLike,
    bank: network.Params,
    images: ArrayLike,
    spec: NetworkSpec,
    *,
    score: str = "sahd_paper",
    method: str | None = None,
    precision: str | None = None,
    steps: int | None = None,
    chunk: int | None = None,
    tile: int | None = None,
    devices: Sequence[Device] | None = None,
) -> Scores:
    """Scores candidates with common random numbers.

    Args:
      genotypes: canonical rows [n, E] of `spec.space`, or pairs [n, 2, E].
      bank: R banks of `make_bank`.
      images: normalised images [R, B, H, W, C], a batch for each bank; [B, H, W, C] serves all banks.
      spec: the network to score in.
      score: a registered score.
      method: ``"shared"`` computes once what candidates have in common in cell 1, and holds tables of it
        (`table_bytes`); ``"batched"`` does, too, and lets tiles of candidates go through the rest side by side;
        ``"each"`` runs one whole network a candidate. Feedback cells take the last two. None takes ``"shared"`` where
        it is possible and its tables fit in half the free memory, on fewer devices if need be; on accelerators it
        times ``"batched"`` beside that where there is much to score (`choice.quickest`).
      precision: ``"bfloat16"`` lets convolutions and Gram matrices read spikes and weights in bfloat16, and sum
        in float32; nothing is lost with a bank of `make_bank`. None takes it on GPUs and TPUs that have it.
      steps: time steps that go through the layers together; None is 1 on a CPU, else T. Of ``"each"``, all or one.
      chunk: candidates a device takes at once; populations of one chunk size share one compiled program. None is
        a power of 2 that spreads them over all devices.
      tile: candidates that are one batch with ``"batched"``, a divisor of the chunk; None is as many as the memory
        that is free holds.
      devices: the devices to share the candidates among; None is all local ones.

    Returns:
      Scores with standard errors over the R replicates.

    Raises:
      ValueError: naming the argument: unknown score or method, a network that `scores.scored_spec` refuses, rows
        that are no cells, images with NaN or of another shape than the spec's, as many batches as banks.

    Example:
      >>> import jax
      >>> from spikernel_jax import CellSpace, NetworkSpec, make_bank, score_population
      >>> spec = NetworkSpec((8, 8, 1), 2, CellSpace((3,)), channels=4, time_steps=2)
      >>> bank = make_bank(jax.random.key(0), spec, seeds=2)
      >>> images = jax.random.normal(jax.random.key(1), (6, 8, 8, 1))  # normalised
      >>> found = score_population(spec.space.enumerate()[:3], bank, images, spec)
      >>> found.scores.shape, found.replicates.shape
      ((3,), (3, 2))
    """
    rows = some_genotypes(spec, genotypes)
    lanes = len(jax.local_devices() if devices is None else devices)
    if chunk is None:  # few sizes, so few programs
        chunk = min(LARGEST_CHUNK, 1 << (-(-len(rows) // lanes) - 1).bit_length())

    def scorer_of(method: str | None) -> Scorer:
        return Scorer(
            bank, images, spec, score=score, method=method, precision=precision, steps=steps, chunk=chunk, tile=tile,
            devices=devices,
        )  # fmt: skip

    if method is None and steps is None and tile is None and choice.is_timed(devices):
        method = choice.quickest(scorer_of, rows)
    scorer = scorer_of(method)
    order = scorer.order(rows)
    replicates, calls = np.zeros((len(rows), scorer.seeds)), np.zeros(len(rows), np.int64)
    parts = [order[start : start + chunk] for start in range(0, len(rows), chunk)]
    for replicate in range(scorer.seeds):
        waiting = [
            (together, scorer.submit(replicate, [rows[part] for part in together]))
            for together in (parts[i : i + scorer.lanes] for i in range(0, len(parts), scorer.lanes))
        ]
        for together, wait in waiting:
            for part, result in zip(together, wait(), strict=True):
                replicates[part, replicate], calls[part] = result["scores"], result["lif_calls"]
    return over_replicates(replicates, calls)
