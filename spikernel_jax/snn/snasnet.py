"""Published SNASNet checkpoints become models of ours.

Source: the public PyTorch code of Kim et al., ECCV 2022; its parameter names are the table below.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from spikernel_jax.cells.space import FORWARD_EDGES, CellSpace
from spikernel_jax.io.checks import whole
from spikernel_jax.snn import network
from spikernel_jax.snn.model import Model, hashable
from spikernel_jax.snn.neurons import NeuronSpec
from spikernel_jax.snn.spec import CELLS, NetworkSpec, layer_name

_LARGEST = 2**30  # bytes of one array; SNASNet's largest has 0.13 GB
_FIXED = (  # layer, public prefix of its convolution or linear layer, of its batch norm
    ("stem", "stem.0", "stem.1"),
    ("transition.in", None, "downconv1.0"),
    ("transition.conv", "downconv1.2", "downconv1.3"),
    ("last", None, "last_act.0"),
    ("head.hidden", "classifier.1", None),
    ("head.out", "classifier.3", None),
)


def _names(spec: NetworkSpec, genotype: Any) -> Iterator[tuple[str, str | None, str | None]]:
    """(our layer, public prefix of its weights, public prefix of its batch norm)."""
    yield from _FIXED
    for cell, codes in zip(CELLS, spec.codes(genotype), strict=True):
        for position, (edge, code) in enumerate(zip(spec.space.edges, codes, strict=True)):
            if spec.space.operation(code).reads_spikes:
                back = position >= len(FORWARD_EDGES)
                number = position - len(FORWARD_EDGES) * back
                prefix = f"{cell}.cell_architecture{'_back' * back}.{number}"
                yield layer_name(cell, edge, spec.space.operations[code]), f"{prefix}.1", f"{prefix}.2"


def _read(source: Any) -> dict[str, np.ndarray]:
    """A state dict as NumPy arrays, from a mapping or from a .npz or .safetensors file."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.isfile(path):
            raise ValueError(f"state_dict={path!r}: no such file")
        try:
            if path.endswith(".safetensors"):
                from safetensors.numpy import load_file

                source = load_file(path)
            elif path.endswith(".npz"):
                # Opened here, because np.load leaves a truncated archive open.
                with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                    sizes = {entry.filename: entry.file_size for entry in archive.zip.infolist()}
                    if large := [name for name, size in sizes.items() if size > _LARGEST]:
                        raise ValueError(f"state_dict={path!r}: {large[0]} unpacks to over {_LARGEST:,} bytes")
                    source = {name: archive[name] for name in archive.files}
            else:
                raise ValueError(f"state_dict={path!r}: want a .npz or a .safetensors file")
        except (OSError, KeyError, EOFError) as error:
            raise ValueError(f"state_dict={path!r} cannot be read: {error}") from error
        except Exception as error:
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"state_dict={path!r} is truncated or corrupt: {error}") from error
    if not isinstance(source, Mapping):
        raise ValueError(f"state_dict is a {type(source).__name__}: want a mapping or a file")
    return {name.removeprefix("module."): np.asarray(value) for name, value in source.items()}


def _parse_matrix(matrix: Any) -> tuple[CellSpace, np.ndarray]:
    """The cell space and row of a connection matrix, or of its four words."""
    if isinstance(matrix, str):
        text = matrix
    else:
        entries = np.asarray(matrix)
        if entries.shape != (4, 4) or not np.isin(entries, range(5)).all():
            raise ValueError(f"matrix={matrix!r}: want four words as '0303 0030 2002 0200', or 4x4 of 0..4")
        text = " ".join("".join(str(int(entry)) for entry in row) for row in entries)
    feedback = CellSpace((1, 3), feedback=True)
    row = feedback.parse(text)
    if not row[len(FORWARD_EDGES) :].any():
        return CellSpace((1, 3)), row[: len(FORWARD_EDGES)]
    return feedback, row


def load_snasnet(
    state_dict: Any,
    matrix: Any,
    *,
    num_classes: int | None = None,
    image_size: int = 32,
    time_steps: int = 5,
    tau: float = 4 / 3,
    v_threshold: float = 1.0,
    stem_stride: int = 1,
    head_pool: int | None = None,
    dropout: float = 0.5,
    mean: tuple[float, ...] = (0.4913, 0.4821, 0.4465),
    std: tuple[float, ...] = (0.2470, 0.2434, 0.2615),
) -> Model:
    """Makes a model from weights of the public SNASNet code; widths are read from the weights.

    Args:
      state_dict: parameters by their public names: a mapping of arrays, or the path of a ``.npz`` or
        ``.safetensors`` file. Running statistics may be absent (then they are at their start).
      matrix: the cell, as four words ``"0303 0030 2002 0200"`` or a 4×4 array.
      num_classes: None infers it from the outputs: 10 neurons a class up to 100 outputs, else 5.
      image_size: height and width of the images.
      time_steps: T it was trained with.
      tau: membrane time constant.
      v_threshold: firing threshold.
      stem_stride: 2 for TinyImageNet.
      head_pool: the last average pooling; None infers it from the head's inputs.
      dropout: the rate it was trained with; acts only where a mask is given.
      mean: normalisation of uint8 images.
      std: normalisation of uint8 images.

    Returns:
      The model. Its genotype is the matrix as given; where weights are only there for the pruned
      cell, the pruned one.

    Raises:
      ValueError: if the file cannot be read, the matrix is malformed, or a weight is missing or has
        another shape than the others imply.

    Example:
      >>> from spikernel_jax import load_snasnet
      >>> model = load_snasnet("snasnet.safetensors", "0303 0030 2002 0200")  # doctest: +SKIP
      >>> load_snasnet({}, "0303 0030 2002 0200")
      Traceback (most recent call last):
          ...
      ValueError: ...
    """
    public = _read(state_dict)
    space, row = _parse_matrix(matrix)

    def get(name: str, dimensions: int | None = None) -> np.ndarray:
        if name not in public:
            raise ValueError(f"state_dict has no {name!r}, which cell {space.format(row)!r} needs")
        if dimensions not in (None, public[name].ndim):
            raise ValueError(f"state_dict: {name} has shape {public[name].shape}: want {dimensions} dimensions")
        array = public[name]
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"state_dict: {name} has dtype {array.dtype} or a NaN or infinity: want finite floats")
        return array

    channels, image_channels = get("stem.0.weight", 4).shape[:2]
    hidden, features = get("classifier.1.weight", 2).shape
    outputs = get("classifier.3.weight", 2).shape[0]
    classes: int = outputs // (10 if outputs <= 100 else 5) if num_classes is None else num_classes
    if classes < 1 or outputs % classes:
        raise ValueError(f"num_classes={classes} does not divide the {outputs} outputs of classifier.3")
    for name, value, most in (("image_size", image_size, 4096), ("stem_stride", stem_stride, 2)):
        whole(name, value, 1, most)
    if head_pool is None:
        side = image_size // stem_stride // 2
        fitting = [p for p in range(1, side + 1) if 2 * channels * (side // p) ** 2 == features]
        if not fitting:
            raise ValueError(
                f"classifier.1 has {features} inputs, which no head_pool gives for image_size={image_size}, "
                f"stem_stride={stem_stride} and {channels} channels"
            )
        head_pool = fitting[0]
    spec = NetworkSpec(
        image_shape=(image_size, image_size, image_channels),
        num_classes=classes,
        space=space,
        channels=channels,
        time_steps=time_steps,
        neuron=NeuronSpec(tau=tau, v_threshold=v_threshold),
        stem_stride=stem_stride,
        head="snasnet",
        head_pool=head_pool,
        head_hidden=hidden,
        neurons_per_class=outputs // classes,
        dropout=dropout,
    )
    if any(prefix and f"{prefix}.weight" not in public for _, prefix, _ in _names(spec, row)):
        row = space.prune(row)
    params: network.Params = {}
    stats: network.Stats = {}
    shapes = spec.layers(row)
    for layer, weights, norm in _names(spec, row):
        entry: dict[str, Any] = {}
        shape = shapes[layer]
        if weights:
            want = (*shape.shape[:-3:-1], *shape.shape[:-2])  # PyTorch's [out, in(, k, k)]
            entry["kernel"] = _kernel(spec, layer, _shaped(get(f"{weights}.weight"), want, weights))
            if shape.bias:
                entry["bias"] = _shaped(get(f"{weights}.bias"), (shape.channels,), weights)
        if norm:
            width = (shape.channels,)
            entry["scale"] = _shaped(get(f"{norm}.weight"), width, norm)
            entry["bias"] = _shaped(get(f"{norm}.bias"), width, norm)
            zeros = np.zeros_like(entry["scale"])
            running = {"mean": zeros, "var": zeros + 1}  # at their start, where the file has none at all
            if any(name.endswith((".running_mean", ".running_var")) for name in public):
                running = {name: _shaped(get(f"{norm}.running_{name}"), width, norm) for name in running}
            if (running["var"] < 0).any():
                raise ValueError(f"state_dict: {norm}.running_var has values below 0")
            stats[layer] = {name: jnp.asarray(value) for name, value in running.items()}
        params[layer] = {name: jnp.asarray(value) for name, value in entry.items()}
    return Model(spec, hashable(row), params, stats, mean, std, {"source": "SNASNet checkpoint"})


def _shaped(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"state_dict: {name} has shape {array.shape}, but the other weights imply {shape}")
    return array


def _kernel(spec: NetworkSpec, layer: str, array: np.ndarray) -> np.ndarray:
    """Public [out, in(, k, k)] weights in our layout."""
    if layer == "head.hidden":  # its inputs are flattened [C, H, W] there, [H, W, C] here
        h, w = spec.pooled_size
        kernel_OCHW = array.reshape(-1, spec.cell_channels(1), h, w)
        return kernel_OCHW.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def dropout_keep(spec: NetworkSpec, public_BF: Any) -> np.ndarray:
    """A public dropout mask, flattened [C, H, W], in the order of our head's inputs."""
    keep = np.asarray(public_BF)
    h, w = spec.pooled_size
    return keep.reshape(-1, spec.cell_channels(1), h, w).transpose(0, 2, 3, 1).reshape(keep.shape)
