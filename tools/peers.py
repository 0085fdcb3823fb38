"""The PyTorch peer of the scoring benchmark: candidates scored as the public SNASNet code scores them.

Our engine is compared with what a user of the public code has: spikingjelly's own `SNASNet`, scored one
candidate at a time. For each candidate

1. the network is built anew, with weights of its own at the public initialisation, in train mode: batch norm
   on batch statistics (its running statistics are moved, as there), dropout 0.5, no gradients;
2. every LIF layer gets a forward hook, and the network runs step by step, T steps, on each batch in turn;
3. the hook takes the spikes x [B, N] of one LIF call and computes, in float32, ``N - 0.5 rho`` with
   ``rho = HD / (E + 1e-3)`` (the code form of SAHD, named ``sahd_code`` here), two matrix products for HD
   and two outer ones for E; it is brought to the host and added up in NumPy float64;
4. the score is ``log|det(K / calls)|``, averaged over the batches.

Membranes and the dropout mask are *not* reset between the batches, but feedback is: so does the public code
of the golden numbers (commit 4980409), and the sums of a second batch start from what the first has left.

**In the seconds**: building and initialising, all passes, hooks, transfers, log-determinants. **Not in
them**: imports, loading and augmenting images, drawing and pruning cells, and bringing images to NCHW. The
first candidate of a process also pays for torch's warm-up; give it one that is not counted.

**What is ours.** The class fixes its widths, image size and head. A subclass fixes them to a `NetworkSpec`'s
by attributes that its constructor cannot overwrite (`_Fixed`); not a line of its constructor or of its
forward pass is replaced. Candidates draw their weights from a seed of their own, so that a score does not
depend on which others ran. The loop around the class is written after the formulas and checked against
the golden numbers, spikes and kernels both, by ``tests/tools/test_peers.py``.

**What differs from our engine**, so that the two are compared with open eyes. The same work in both: one
network a candidate, R batches, every LIF call of `spec.sites`. Work that only the peer does: building, weights
of each candidate's own, a LIF for every convolution edge (edges that leave one node see the same spikes; we
compute them once), zero edges as a multiplication by 0, running statistics, a transfer and a float64 sum at
each LIF call, dropout. Work that only our engine does: a standard error, compilation (timed apart). The peer
counts on its own terms: it is neither compiled nor written anew to be faster. It runs on torch's first GPU where
there is one, else on the CPU with as many threads as torch takes by default (`describe`).

**Installation.** torch is no dependency of the package. In an environment that has the package::

    pip install torch==2.13.0 'loguru>=0.7,<1' h5py
    pip install --no-deps spikingjelly==2.0.0

(``--no-deps``, because spikingjelly asks for torchvision, torchaudio and tensorboard, which this does not need.
PyTorch's CPU build, ``torch==2.13.0+cpu``, is much smaller and enough.)

Sources: Kim et al., ECCV 2022, arXiv 2201.10355, and its public code; spikingjelly 2.0.0
(`spikingjelly.activation_based.model.snas_net`).
"""

import functools
import importlib
import importlib.metadata
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikernel_jax.data import check_images
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import NetworkSpec

INSTALL = (
    "pip install torch==2.13.0 'loguru>=0.7,<1' h5py",
    "pip install --no-deps spikingjelly==2.0.0",
)


class KernelSums(NamedTuple):
    """What the public loop makes of one network: K of each batch, and its scores."""

    kernels: NDArray[np.float64]  # [R, B, B] mean over LIF calls of N - 0.5 rho
    scores: NDArray[np.float64]  # [R] log|det| of each
    lif_calls: int  # LIF calls in one batch


class PeerScores(NamedTuple):
    """Scores of a population, by the public way, and what they cost."""

    scores: NDArray[np.float64]  # [n] mean over batches
    replicates: NDArray[np.float64]  # [n, R]
    lif_calls: NDArray[np.int64]  # [n] LIF calls that the score counts
    seconds: NDArray[np.float64]  # [n] wall time of each candidate


class _Fixed:
    """An attribute that keeps its value, whatever a constructor assigns to it."""

    def __init__(self, value: Any):
        self.value = value

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.value

    def __set__(self, instance: Any, value: Any) -> None:
        pass


class _ChannelRatio:
    """What SNASNet multiplies its widths 128 and 256 by: they become C and 2C."""

    def __init__(self, channels: int):
        self.channels = channels

    def __rmul__(self, width: int) -> int:
        return width * self.channels // 128


@functools.cache
def _libraries() -> tuple[Any, Any, Any]:
    """torch, spikingjelly's SNASNet module, its LIF class."""
    torch = importlib.import_module("torch")
    snas_net = importlib.import_module("spikingjelly.activation_based.model.snas_net")
    return torch, snas_net, snas_net.neuron.LIFNode


def missing() -> str | None:
    """None where the peer can run; else one line that says what is missing and how to install it."""
    try:
        _libraries()
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is not there
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"no PyTorch peer ({reason}); to have it: {' && '.join(INSTALL)}"
    return None


def _device() -> str:
    """Where torch runs the peer."""
    return "cuda" if _libraries()[0].cuda.is_available() else "cpu"


def describe() -> dict[str, str | int]:
    """Versions of torch and spikingjelly, the device, and the threads torch takes.

    Raises:
      ImportError: where they are missing.
    """
    torch, _, _ = _libraries()
    device = _device()
    return {
        "device": torch.cuda.get_device_name(device) if device == "cuda" else device,
        "torch": torch.__version__,
        "spikingjelly": importlib.metadata.version("spikingjelly"),
        "threads": torch.get_num_threads(),
    }


def _check_spec(spec: NetworkSpec) -> None:
    """Refuses networks that the public class cannot be."""
    if spec.space.kernel_sizes != (1, 3):
        raise ValueError(f"kernel_sizes={spec.space.kernel_sizes}: the public SNASNet has only (1, 3)")
    if spec.head != "snasnet":
        raise ValueError(f"head={spec.head!r}: the public SNASNet has only the head 'snasnet'")
    if spec.norm != "per_step":
        raise ValueError(f"norm={spec.norm!r}: the public SNASNet has only 'per_step'")
    lif = NeuronSpec(tau=spec.neuron.tau, v_threshold=spec.neuron.v_threshold)
    if spec.neuron != lif:
        raise ValueError(f"neuron={spec.neuron}: the public SNASNet has only {lif}")
    if len(set(spec.image_shape[:2])) > 1:
        raise ValueError(f"image_shape={spec.image_shape}: the public SNASNet takes only square images")


def matrices(genotypes: ArrayLike, spec: NetworkSpec) -> NDArray[np.int64]:
    """SNASNet's matrices of a population, dead nodes dropped as the public search does.

    Args:
      genotypes: rows [n, E] of `spec.space`, or matrices [n, 4, 4], row = source, column = target.
      spec: the network to score in.

    Returns:
      [n, 4, 4], entries 0 zero, 1 skip, 2 conv1x1, 3 conv3x3, 4 avgpool.

    Raises:
      ValueError: another shape, an entry that no edge of the space has, rows that are no cells.
    """
    _check_spec(spec)
    given = np.asarray(genotypes)
    edges = spec.space.edges
    if given.ndim not in (2, 3) or given.shape[1:] not in ((len(edges),), (4, 4)) or not len(given):
        raise ValueError(f"genotypes have shape {given.shape}; want [n, {len(edges)}] or [n, 4, 4] with n >= 1")
    sources, targets = np.transpose(edges)
    if given.ndim == 3:
        others = np.ones((4, 4), bool)
        others[sources, targets] = False
        if (wrong := given[:, others].any(1)).any():
            raise ValueError(
                f"matrix {given[np.argmax(wrong)].tolist()} has entries where {spec.space} has no edge: "
                "feedback edges need a space with feedback=True, and the diagonal must be 0"
            )
        given = given[:, sources, targets]
    out = np.zeros((len(given), 4, 4), np.int64)
    out[:, sources, targets] = spec.space.prune(given)  # with sizes (1, 3) our codes are SNASNet's
    return out


def build(matrix: ArrayLike, spec: NetworkSpec) -> Any:
    """The public network of one cell at the public initialisation, from torch's global generator.

    Args:
      matrix: [4, 4], as `matrices` makes it.
      spec: the network; `dropout` is not read, the public class has 0.5.

    Returns:
      A `torch.nn.Module` in train mode, float32.
    """
    _check_spec(spec)
    _, snas_net, _ = _libraries()
    fixed = {
        "channel_ratio": _ChannelRatio(spec.channels),
        "in_channel": spec.image_shape[2],
        "stem_stride": spec.stem_stride,
        "img_size": spec.pooled_size[0],  # read only for the head's inputs, over spatial_decay
        "spatial_decay": 1,
        "classifier_inter_ch": spec.head_hidden,
        "num_class": spec.num_classes,
        "num_final_neuron": spec.outputs,
        "num_cluster": spec.neurons_per_class,
    }
    members = {name: _Fixed(value) for name, value in fixed.items()}
    args = SimpleNamespace(
        dataset="cifar10",  # sets only what is fixed above, and the 128 that channel_ratio multiplies
        celltype="backward" if spec.space.feedback else "forward",
        timestep=spec.time_steps,
        second_avgpooling=spec.head_pool,
        tau=spec.neuron.tau,
        threshold=spec.neuron.v_threshold,
    )
    return type("SNASNet", (snas_net.SNASNet,), members)(args, np.asarray(matrix))


def score_network(net: Any, batches: Sequence[Any]) -> KernelSums:
    """The public scoring loop for one network; membranes go on from batch to batch.

    Args:
      net: what `build` made; its dtype is the one K's terms are computed in.
      batches: R tensors [B, C, H, W].

    Returns:
      Kernels, scores and LIF calls.
    """
    torch, _, lif = _libraries()
    size = len(batches[0])
    kernel, calls = np.zeros((size, size)), 0

    def add(_module: Any, _inputs: Any, out: Any) -> None:
        nonlocal kernel, calls
        flat = out.view(size, -1)
        neurons = flat.size(1)
        x = (flat > 0).to(flat.dtype)
        rate = (x.sum(1) / neurons).unsqueeze(1)
        expected = (rate @ (1 - rate.t()) + (1 - rate) @ rate.t()) * neurons
        weight = 0.5 * torch.ones_like(expected) / (expected + 1e-3)
        distance = (1 - x) @ x.t() + x @ (1 - x.t())
        term = torch.ones_like(expected) * neurons - weight * distance
        kernel = kernel + term.cpu().numpy()
        calls += 1

    hooks = [module.register_forward_hook(add) for module in net.modules() if isinstance(module, lif)]
    kernels = []
    try:
        with torch.no_grad():
            for batch in batches:
                kernel, calls = np.zeros((size, size)), 0
                net(batch)
                kernels.append(kernel / calls)
    finally:
        for hook in hooks:
            hook.remove()
    return KernelSums(np.stack(kernels), np.array([np.linalg.slogdet(k)[1] for k in kernels]), calls)


def snasnet_scores(genotypes: ArrayLike, images: ArrayLike, spec: NetworkSpec, *, seed: int = 0) -> PeerScores:
    """Scores candidates the public way, one after another, and times each.

    Args:
      genotypes: rows [n, E] of `spec.space`, whose kernel sizes must be (1, 3), or matrices [n, 4, 4].
      images: normalised images [R, B, H, W, C]; the public search has R = 2.
      spec: the network to score in, with SNASNet's head and batch norm; `dropout` is not read.
      seed: weights and dropout mask of a candidate follow from it and the candidate's own cell. torch's global
        generator is left as it was.

    Returns:
      Scores (``sahd_code``; -inf is kept), and the wall time of each candidate in seconds.

    Raises:
      ValueError: naming the argument.
      ImportError: torch or spikingjelly is missing (see `missing`).
    """
    cells = matrices(genotypes, spec)
    arrays = np.asarray(images)
    if arrays.ndim != 5 or arrays.shape[2:] != spec.image_shape or arrays.size == 0:
        raise ValueError(f"images have shape {arrays.shape}; want [R, B, {', '.join(map(str, spec.image_shape))}]")
    if arrays.dtype == np.uint8:
        raise ValueError("images are uint8; want normalised ones (spikernel_jax.data.normalise)")
    check_images(arrays.reshape(-1, *spec.image_shape))
    torch, _, _ = _libraries()
    device = _device()
    batches = list(torch.from_numpy(np.ascontiguousarray(np.moveaxis(arrays, -1, 2), np.float32)).to(device))
    identities = spec.space.identity(cells[:, *np.transpose(spec.space.edges)])
    results, seconds = [], []
    with torch.random.fork_rng():
        for cell, identity in zip(cells, identities.tolist(), strict=True):
            start = time.perf_counter()
            torch.manual_seed(int(np.random.SeedSequence([seed, identity]).generate_state(1, np.uint64)[0]))
            results.append(score_network(build(cell, spec).to(device), batches))
            seconds.append(time.perf_counter() - start)
    replicates = np.stack([result.scores for result in results])
    calls = np.array([result.lif_calls for result in results], np.int64)
    return PeerScores(replicates.mean(1), replicates, calls, np.array(seconds))
