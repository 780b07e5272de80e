"""A folder of Transformers as ONNX, with every shared weight in the file once.

In:  a folder with `config.json` and `model.safetensors` (`interop.huggingface` writes them).
Out: a folder with a file for each dtype asked for, the config and tokenizer files, and a README
     with the lines that run it. Checked in ONNX Runtime against PyTorch before anything is written.

The route is PyTorch's own exporter (`torch.export` to ONNX). It keeps what the program shares: the
twelve depths of ALBERT base read one set of initializers (46 MB; exporters that only traced wrote
340). It serves every family and head through one code path, and its makers maintain it. Two others
were tried: jax2onnx 0.17 (which holds orbax-checkpoint below the version needed here, and does not
get through a scan whose batch is symbolic), and jax2tf with tf2onnx (JAX has dropped the lowering
that tf2onnx can read). A graph built by hand would be a second copy of each model.

Sources: pytorch.org/docs/stable/onnx; huggingface/transformers#8869 (ALBERT seven times its size);
keras-team/keras#22443 (the end of jax2tf to ONNX).
"""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from albert_jax.errors import UserError

FILES = {"float32": "model.onnx", "float16": "model_float16.onnx", "int8": "model_int8.onnx"}
TASKS = ("encoder", "fill-mask")
OPSET = 18  # the oldest that the exporter writes by itself; ONNX Runtime reads it since 1.14
_FAMILIES = ("albert", "bert", "distilbert", "roberta")
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
_TOKENIZER_FILES = (
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_CHECKED = ((2, 16), (3, 40))  # rows and length of the batches that a file is checked with
_TOLERANCE = 1e-4  # float32: the same arithmetic in another order
_MOST_BYTES = 2**31  # of a protocol buffer


@dataclasses.dataclass(frozen=True)
class Written:
    """One file, and how near its results are to the model in float32.

    Attributes:
        dtype: float32, float16 or int8.
        file: where.
        inputs, outputs: their names in it.
        bytes: its size.
        max_difference: greatest absolute difference of any output, over two batches of random
            pieces with padding.
    """

    dtype: str
    file: pathlib.Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    max_difference: float


def export(
    source: pathlib.Path,
    folder: pathlib.Path,
    task: str | None = None,
    dtypes: Sequence[str] = ("float32",),
) -> list[Written]:
    """Writes a file for each dtype into the folder; files of the same names are replaced.

    Args:
        source: a folder of Transformers; weights in safetensors alone.
        folder: made where it does not exist.
        task: encoder (the hidden states, without any head) or fill-mask; by default the model that
            the config names.
        dtypes: float32; float16 (weights and arithmetic; inputs and outputs stay as they are),
            which is for GPUs, as most CPUs have no such arithmetic; int8 (weights of matrix
            products and tables, activations rounded as they come), which is for CPUs. One tracing
            serves all.

    Raises:
        UserError: a package is missing, the folder is not one of a family known here, it has no
            weights for the task, or the result is not the model's. Nothing is written then.
    """
    _require_packages()
    for dtype in dtypes:
        if dtype not in FILES:
            raise UserError(f"--dtype={dtype} is none of: {', '.join(FILES)}.")
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        model, longest = _load(source, task)
        batches = [_example(model, rows, min(length, longest)) for rows, length in _CHECKED]
        outputs = tuple(_run(model, batches[0]))
        full = _trace(model, batches[0], outputs, longest, pathlib.Path(scratch) / "full.onnx")
        written = []
        for dtype in dtypes:
            file = _reduce(full, dtype, pathlib.Path(scratch) / FILES[dtype])
            difference = max(_difference(file, model, batch) for batch in batches)
            # What the others lose depends on the weights: it is measured and told, not refused.
            if dtype == "float32" and not difference <= _TOLERANCE:
                raise UserError(
                    f"{source}: ONNX Runtime's results differ from PyTorch's by {difference:.2g}; "
                    f"nothing was written to {folder}."
                )
            size = file.stat().st_size
            written.append(
                Written(dtype, folder / file.name, tuple(batches[0]), outputs, size, difference)
            )
        folder.mkdir(parents=True, exist_ok=True)
        for each in written:
            shutil.copyfile(pathlib.Path(scratch) / each.file.name, each.file)
    for name in ("config.json", *_TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    (folder / "README.md").write_text(_readme(written, longest), encoding="utf-8")
    return written


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {', '.join(missing)}; install them with: pip install 'albert-jax[serving]'"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and progress: none of them is about the user's model."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()


def _load(source: pathlib.Path, task: str | None) -> tuple[Any, int]:
    """The PyTorch model of a folder, and the most pieces that it reads."""
    import transformers

    if task not in (None, *TASKS):
        raise UserError(f"--task={task} is none of: {', '.join(TASKS)}.")
    config_file = source / "config.json"
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source} is no folder of Transformers: {error}.") from None
    family, architecture = fields.get("model_type"), (fields.get("architectures") or [""])[0]
    if family not in _FAMILIES:
        raise UserError(f"{config_file}: model_type={family!r} is none of: {', '.join(_FAMILIES)}.")
    named = getattr(transformers, architecture, None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise UserError(
            f"{config_file}: architectures={architecture!r} is no model of Transformers."
        )
    kinds: dict[str | None, Any] = {
        None: named,
        "encoder": transformers.AutoModel,
        "fill-mask": transformers.AutoModelForMaskedLM,
    }
    options: dict[str, Any] = {
        "dtype": "float32",
        "attn_implementation": "eager",  # the plain graph: others guard against rows of -inf
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    try:
        model, info = kinds[task].from_pretrained(source, **options)
        if task == "encoder" and info["missing_keys"]:
            # A model trained without a pooler: its hidden states are all there is.
            model, info = kinds[task].from_pretrained(source, add_pooling_layer=False, **options)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{source} cannot be loaded by Transformers: {error}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{source} has no weights for {type(model).__name__}: {', '.join(missing)}. "
            f"It holds {architecture}; leave --task out to export that."
        )
    size = sum(4 * weight.numel() for weight in model.parameters())
    if size >= _MOST_BYTES:
        raise UserError(
            f"{source} has {size / 1e9:.1f} GB of weights in float32, and one ONNX file holds less "
            f"than {_MOST_BYTES / 1e9:.1f} GB; export it as StableHLO."
        )
    # RoBERTa counts positions from the one after its padding id.
    offset = model.config.pad_token_id + 1 if family == "roberta" else 0
    return model.eval(), model.config.max_position_embeddings - offset


def _example(model: Any, rows: int, length: int) -> dict[str, Any]:
    """Random pieces, the second half of the first row padding, as a tokenizer would give them."""
    import torch

    config = model.config
    shape = (rows, length)
    if type(model).__name__.endswith("ForMultipleChoice"):
        shape = (rows, 2, length)
    rng = np.random.default_rng(rows)
    mask = np.ones(shape, np.int64)
    mask[0, ..., (length + 1) // 2 :] = 0
    ids = rng.integers(min(5, config.vocab_size - 1), config.vocab_size, shape)
    arrays = {
        "input_ids": np.where(mask == 1, ids, config.pad_token_id or 0),
        "attention_mask": mask,
    }
    if getattr(config, "type_vocab_size", 0) > 1:
        arrays["token_type_ids"] = rng.integers(0, config.type_vocab_size, shape)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _run(model: Any, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        return {name: array.numpy() for name, array in model(**inputs).items()}


def _trace(
    model: Any,
    inputs: Mapping[str, Any],
    outputs: tuple[str, ...],
    longest: int,
    file: pathlib.Path,
) -> pathlib.Path:
    """Writes the model in float32 to `file`, and returns that."""
    import onnx
    import onnxscript.ir
    import onnxscript.optimizer
    import torch
    from onnx_ir.passes import common as passes

    dims = [torch.export.Dim("batch"), torch.export.Dim("sequence", min=2, max=longest)]
    if inputs["input_ids"].ndim == 3:
        dims.insert(1, torch.export.Dim("choices"))
    program: Any = torch.onnx.export(
        model,
        kwargs=dict(inputs),
        dynamic_shapes={name: dict(enumerate(dims)) for name in inputs},
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )

    def should_fold(node: Any) -> bool | None:
        # A weight is stored [out, in] and transposed where it is used. Turned here, it is an
        # initializer of the product, which is what quantisation looks for. The table that is read
        # in both ways stays as it is, or it would be stored twice.
        if node.op_type != "Transpose":
            return None
        weight = node.inputs[0]
        return weight.is_initializer() and len(weight.uses()) == 1

    onnxscript.optimizer.fold_constants_ir(program.model, should_fold=should_fold)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    # The exporter has turned small weights itself, anew at each depth.
    passes.DeduplicateInitializersPass(_MOST_BYTES)(program.model)
    proto = onnxscript.ir.to_proto(program.model)
    # Out go where each node came from, with this machine's paths; and shapes, which readers work
    # out themselves (quantisation turns some weights, and stumbles over their old ones).
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(proto, file)
    onnx.checker.check_model(file, full_check=True)
    return file


def _reduce(full: pathlib.Path, dtype: str, file: pathlib.Path) -> pathlib.Path:
    """Writes the model in another dtype to `file`, and returns that."""
    import onnx
    import onnxruntime.quantization
    from onnxruntime.transformers import float16

    if dtype == "float32":
        shutil.copyfile(full, file)
    elif dtype == "float16":
        onnx.save(float16.convert_float_to_float16(onnx.load(full), keep_io_types=True), file)
    else:
        onnxruntime.quantization.quantize_dynamic(full, file)
    return file


def _difference(file: pathlib.Path, model: Any, inputs: Mapping[str, Any]) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    got = session.run(None, {name: array.numpy() for name, array in inputs.items()})
    pairs = zip(_run(model, inputs).values(), got, strict=True)
    return max(float(np.abs(expected - np.asarray(array)).max()) for expected, array in pairs)


def _readme(written: list[Written], longest: int) -> str:
    first = written[0]
    feed = ", ".join(f'"{name}": {name}' for name in first.inputs)
    files = "\n".join(
        f"| `{each.file.name}` | {each.bytes / 1e6:.1f} | {each.max_difference:.1e} |"
        for each in written
    )
    return f"""# A model to be served by ONNX Runtime

Any batch size, any length up to {longest}; opset {OPSET}. It needs `onnxruntime`, nothing else:

```python
import onnxruntime

session = onnxruntime.InferenceSession("{first.file.name}")
outputs = session.run(None, {{{feed}}})
```

In, int64 [batch, sequence]: {_listed(first.inputs)}; `attention_mask` is 1 on tokens, 0 on
padding. Out: {_listed(first.outputs)}.

| file | MB | greatest difference from the model in float32, over random pieces |
| --- | --- | --- |
{files}
"""


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)
