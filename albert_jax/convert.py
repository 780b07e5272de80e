"""Models of others in, ours out, and ready to serve: equal in every weight.

  python -m albert_jax.convert --model=runs/mine --to=huggingface --output=mine_hf
  python -m albert_jax.convert --model=albert-base-v2 --to=albert_jax --output=runs/v2
  python -m albert_jax.convert --model=albert_base/model.ckpt-best --to=huggingface \\
      --tokenizer=albert_base/30k-clean.model --output=base_hf
  python -m albert_jax.convert --model=runs/mine --to=onnx --dtype=float32 --dtype=int8 \\
      --task=fill-mask --output=mine_onnx

--model is a run of albert_jax.train, a folder of Hugging Face Transformers (ALBERT, BERT, RoBERTa
or DistilBERT, with any head), or a checkpoint or TensorFlow Hub module of Google's ALBERT or BERT;
what it is, the command sees. Formats:

  huggingface  config.json, model.safetensors, tokenizer, model card: AutoModel... loads the folder
  google       model.ckpt-STEP.*, with the optimizer's slots where --slots asks for them
  tfhub        the same variables as a module of TensorFlow Hub
  albert_jax   a run, for predict, evaluate and train --init
  stablehlo    a program that plain JAX runs, on CPUs, TPUs and GPUs
  onnx         for ONNX Runtime; --dtype=float16 and int8 are smaller, and measured

What does not fit is listed, and then nothing is written.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from albert_jax import cli, storage
from albert_jax.errors import UserError

if TYPE_CHECKING:
    from albert_jax.data.tokenizer import Tokenizer
    from albert_jax.interop.tensors import Model

_TASKS = ("encoder", "fill-mask")
_DTYPES = ("float32", "float16", "int8")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser(__doc__ or "", "convert")
    parser.add_argument("--model", required=True, type=pathlib.Path, help="what to convert")
    parser.add_argument("--to", required=True, choices=list(_FORMATS), help="the format")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="a new folder")
    parser.add_argument("--step", type=int, help="which checkpoint of a run; the newest by default")
    parser.add_argument("--tokenizer", metavar="FILE", help="if the model has none")
    parser.add_argument("--slots", action="store_true", help="keep the optimizer's moments too")
    parser.add_argument("--task", choices=_TASKS, help="what stablehlo and onnx compute")
    parser.add_argument(
        "--dtype", action="append", choices=_DTYPES, help="of onnx; may be given several times"
    )
    args = parser.parse_args(argv)
    _check_flags(parser, args)
    if storage.is_remote(args.output):
        taken = bool(storage.listing(args.output))
    else:
        taken = args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir()))
    if taken:
        raise UserError(f"--output={args.output} is a file or not empty; name a new folder.")

    from albert_jax.interop import models
    from albert_jax.training import run_folder

    args.model = run_folder.fetched(args.model)
    model = models.read(args.model, args.step, args.slots)
    if model.head.kind == "question_answering_conditional" and args.to != "albert_jax":
        raise UserError(
            f"{args.model} finds the end of an answer given its begin, with a head that "
            f"--to={args.to} does not know; --config.task.answer_head=plain makes one that it does."
        )
    for note in model.notes:
        print(f"note: {run_folder.spoken(note)}", file=sys.stderr)
    spoken = models.read_tokenizer(args.model, model, args.tokenizer)
    if spoken is None and args.to in ("huggingface", "albert_jax"):
        place = run_folder.spoken(str(args.model))
        print(f"note: {place} has no tokenizer; --tokenizer=FILE adds one", file=sys.stderr)
    if storage.is_remote(args.output):
        with run_folder.opened(args.output) as folder:
            _FORMATS[args.to](folder, model, spoken, args)
        place, size = storage.named(args.output), sum(storage.listing(args.output).values())
    else:
        place, size = args.output, _write_local(args.output, model, spoken, args)
    print(
        f"{place}: {model.config.model_type}, {model.head.kind.replace('_', ' ')}, "
        f"step {model.step}, {size / 1e6:.1f} MB as {args.to}"
    )
    return 0


def _write_local(
    output: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> int:
    """Written beside its place and moved there whole; returns the bytes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".unfinished") as scratch:
        folder = pathlib.Path(scratch) / "folder"
        folder.mkdir()
        _FORMATS[args.to](folder, model, spoken, args)
        if output.exists():
            output.rmdir()
        folder.replace(output)
    return sum(file.stat().st_size for file in output.rglob("*") if file.is_file())


def _check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.slots and args.to != "google":
        parser.error("--slots goes with --to=google (train --init --slots reads them from there)")
    if args.task and args.to not in ("stablehlo", "onnx"):
        parser.error("--task goes with --to=stablehlo and --to=onnx")
    if args.dtype and args.to != "onnx":
        parser.error("--dtype goes with --to=onnx")


def _to_huggingface(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import huggingface, model_card, models

    special = {}
    if spoken is not None:
        special = {
            "pad_token_id": spoken.pad_id,
            "bos_token_id": spoken.cls_id,
            "eos_token_id": spoken.sep_id,
        }
        for name, content in models.tokenizer_files(spoken, model).items():
            (folder / name).write_bytes(content)
    huggingface.save(folder, model.config, model.head, model.params, special)
    card = model_card.text(args.model, model, spoken)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _to_google(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import google

    if args.slots and model.moments is None:
        raise UserError(f"--slots: {args.model} holds no moments of an optimizer.")
    moments = model.moments if args.slots else None
    google.save(folder, model.config, model.head, model.params, model.step, moments)
    if spoken is not None:
        (folder / _google_name(spoken)).write_bytes(spoken.content)


def _to_tfhub(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import google

    google.save_module(folder, model.config, model.head, model.params)
    if spoken is not None:
        (folder / "assets" / _google_name(spoken)).write_bytes(spoken.content)


def _google_name(spoken: "Tokenizer") -> str:
    """What Google's code calls a tokenizer's file."""
    return {"tokenizer.model": "30k-clean.model"}.get(spoken.file_name, spoken.file_name)


def _to_albert_jax(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import models

    models.write_run(folder, model, spoken)


def _to_stablehlo(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import models, stablehlo
    from albert_jax.model import finetuning

    if model.head.kind in finetuning.HEADS:
        labels = max(len(model.head.labels), 1)
        served = stablehlo.finetuned(model.config, model.params, model.head.kind, labels)
    elif args.task == "fill-mask":
        if "masked_lm" not in model.params:
            raise UserError(f"--task=fill-mask: {args.model} has no masked-word head.")
        served = stablehlo.fill_mask(model.config, model.params)
    else:
        served = stablehlo.encoder(model.config, model.params)
    stablehlo.export(served, folder, {"labels": list(model.head.labels)})
    if spoken is not None:
        for name, content in models.tokenizer_files(spoken, model).items():
            (folder / name).write_bytes(content)


def _to_onnx(
    folder: pathlib.Path, model: "Model", spoken: "Tokenizer | None", args: argparse.Namespace
) -> None:
    from albert_jax.interop import onnx_model

    with tempfile.TemporaryDirectory() as scratch:
        _to_huggingface(pathlib.Path(scratch), model, spoken, args)
        written = onnx_model.export(
            pathlib.Path(scratch), folder, args.task, args.dtype or ("float32",)
        )
    for file in written:
        print(
            f"{file.file.name}: {file.bytes / 1e6:.1f} MB, at most {file.max_difference:.1e} from "
            "the original's outputs"
        )


_FORMATS: dict[str, Callable[..., None]] = {
    "huggingface": _to_huggingface,
    "google": _to_google,
    "tfhub": _to_tfhub,
    "albert_jax": _to_albert_jax,
    "stablehlo": _to_stablehlo,
    "onnx": _to_onnx,
}


if __name__ == "__main__":
    cli.run(main)
