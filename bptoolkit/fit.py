"""`bptoolkit fit NAME`: train a recipe, with LightningCLI underneath.

A run lives in its folder, `runs/RECIPE/RUN`:

    config.yaml     every option, resolved; `--config` takes it back
    metrics.csv     a row per step
    last.ckpt       what `--resume auto` goes on from, exactly
    result.json     how it ended: finished, interrupted or failed; the result, and whether the recipe's floor was reached
    versions.json   Python, torch, lightning, bptoolkit, platform, and the fingerprint of the data
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from bptoolkit.recipe import Listing, Recipe, find, table

NEEDS = {"lightning": "lightning", "jsonargparse": "jsonargparse", "sklearn": "scikit-learn", "yaml": "PyYAML"}
LENGTH = ("max_epochs", "max_steps", "max_time", "limit_train_batches", "limit_test_batches", "overfit_batches", "fast_dev_run")
USAGE = """bptoolkit fit NAME [--layers torch|bptoolkit] [--run RUN] [--resume auto|none|PATH] [--smoke] [OPTION ...]"""
EPILOG = """every other OPTION goes to LightningCLI:
  --config FILE               options from a YAML file, such as the config.yaml of a run
  --print_config              print every option and its value, and stop
  --model.lr 0.001            an option of the recipe's model
  --data.batch_size 32        an option of its data
  --trainer.max_epochs 5      any argument of Lightning's Trainer: accelerator, devices, strategy, precision,
                              accumulate_grad_batches, gradient_clip_val, logger, callbacks ...
  --checkpoint.every_n_steps 100   steps between two checkpoints
  --seed_everything 1         the seed of the weights and of dropout

exit status: 0 finished; 1 failed, or the recipe's floor was missed; 2 no such recipe or option, or it does not fit the run;
130 or 143 stopped by SIGINT or SIGTERM with a checkpoint saved: the same command goes on from it
"""


class Problem(Exception):
    """What the user can put right; printed without a traceback, exit status 2."""


def main(argv: list[str]) -> int:
    """Train one recipe.

    Returns:
        The exit status, see `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="bptoolkit fit",
        usage=USAGE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument("--layers", choices=("torch", "bptoolkit"), help="whose backward passes; default bptoolkit")
    parser.add_argument("--run", metavar="RUN", help="name of the run and its folder, runs/NAME/RUN; default LAYERS")
    parser.add_argument(
        "--resume",
        metavar="auto|none|PATH",
        default="auto",
        help="auto: go on from the folder's last checkpoint if there is one; none: start over; PATH: from this checkpoint",
    )
    parser.add_argument("--smoke", action="store_true", help="a run of under a minute that starts over; floors are not judged")
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        print("\nthe recipes:\n" + table())
        return 0 if argv else 2
    try:
        listing = find(argv[0])
        options, rest = parser.parse_known_args(argv[1:])
        missing = [NEEDS[m] for m in NEEDS if find_spec(m) is None]
        if missing:
            raise Problem(f"this needs {', '.join(missing)}: pip install 'bptoolkit[recipes]'")
        return fit(listing, rest, layers=options.layers, run=options.run, resume=options.resume, smoke=options.smoke)
    except (LookupError, Problem) as problem:
        print(f"bptoolkit fit: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted before there was anything to save", file=sys.stderr)
        return 130


def fit(
    listing: Listing,
    args: list[str],
    *,
    layers: str | None = None,
    run: str | None = None,
    resume: str = "auto",
    smoke: bool = False,
) -> int:
    """Train a recipe with the arguments of LightningCLI; returns the exit status. The result is in the run's folder."""
    import torch
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from bptoolkit.training import Interrupted

    quiet()
    started = time.perf_counter()
    recipe = listing.load()
    if recipe.threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(recipe.threads)
    if layers is not None:
        args = [*args, f"--model.layers={layers}"]
    cli = command_line(listing, recipe, args, smoke)
    folder = Path("runs", listing.name, run or cli.config.model.layers + ("-smoke" if smoke else ""))
    checkpoint = prepare(folder, cli, "none" if smoke and resume == "auto" else resume)
    trainer, model, data = cli.build(folder)
    first = trainer.is_global_zero
    result: dict[str, Any] = {"recipe": listing.name, "smoke": smoke, "status": "running"}
    try:
        data.trainer = trainer
        data.setup("fit")
        if first:
            save_json(folder / "versions.json", versions(data))
            say(f"{listing.name}: {layers_used(model)}")
            say(f"in {folder}" + (f", resumed from {checkpoint}" if checkpoint else ""))
        try:
            trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        except MisconfigurationException as error:
            raise Problem(str(error)) from error
        if first and checkpoint and not any(getattr(c, "rows", ()) for c in trainer.callbacks):
            say("it had finished: nothing was left to train; --resume none starts over")
        result["steps"] = trainer.global_step
        figures = trainer.test(model, datamodule=data, verbose=False)[0]
        result.update(figures, seconds=round(time.perf_counter() - started, 1), status="finished")
        if recipe.beside is not None and first:
            result["beside"] = recipe.beside(data, folder)
    except Interrupted as stop:
        result.update(status="interrupted", steps=stop.step)
        if first:
            save_json(folder / "result.json", result)
            say(f"{stop}; {folder / 'last.ckpt'} has all of it, and the same command goes on from there")
        return 128 + stop.signum
    except BaseException:
        result["status"] = "failed"
        if first:
            save_json(folder / "result.json", result)
        raise
    return judge(recipe, cli, result, folder) if first else 0


def command_line(listing: Listing, recipe: Recipe, args: list[str], smoke: bool) -> Any:
    """LightningCLI for one recipe, with its arguments parsed and nothing built yet."""
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from bptoolkit.training import Checkpoints, Metrics

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise Problem(message.replace("\n", " ") + existing(self, message))

    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(Checkpoints, "checkpoint")
            if smoke:
                parser.set_defaults(dict(recipe.smoke))

        def instantiate_classes(self) -> None:
            """Wait for `build`: the folder is not ready."""

        def build(self, folder: Path) -> tuple[Any, Any, Any]:
            if rank_zero():  # before the folder is filled in: a run that takes this back has a folder of its own
                self.parser.save(self.config, folder / "config.yaml", overwrite=True)
            if self.config.trainer.default_root_dir is None:
                self.config.trainer.default_root_dir = str(folder)
            if self.config.checkpoint.folder is None:
                self.config.checkpoint.folder = str(folder)
            bar = self.config.trainer.enable_progress_bar is not False
            self.trainer_defaults = {"callbacks": [Metrics(folder / "metrics.csv", echo=not bar), *_bars(bar)]}
            super().instantiate_classes()
            return self.trainer, self.model, self.datamodule

    shown = sys.stdout.isatty()  # elsewhere a bar is noise, and a line per validation is not
    defaults = {
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": shown,
        **recipe.trainer,
    }
    argv, sys.argv = sys.argv, sys.argv[:1]  # LightningCLI warns of arguments that are its own as well
    try:
        return CLI(
            recipe.model,
            recipe.data,
            args=args,
            run=False,
            parser_class=Parser,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=defaults,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": f"bptoolkit fit {listing.name}"},
        )
    finally:
        sys.argv = argv


def _bars(wanted: bool) -> list[Any]:
    if not wanted or find_spec("rich") is None:  # without rich, Lightning's own
        return []
    from bptoolkit.progress import RunBar

    return [RunBar()]


def existing(parser: Any, message: str) -> str:
    """For a message about an option that does not exist: the nearest one, and all there are."""
    if "nrecognized" not in message and "not expected" not in message:
        return ""
    names = sorted({o[2:] for a in parser._actions for o in a.option_strings if o.startswith("--")})
    names = [n for n in names if not n.endswith((".help", "+"))]
    words = [w.strip("'\"-,:;.").split("=")[0] for w in message.split()]
    near = [m for w in words if "." in w or len(w) > 4 for m in get_close_matches(w, names, 1, 0.8)]
    lines = ["", f"did you mean --{near[0]}?" if near else "", "the options are: --layers, --run, --resume, --smoke, and"]
    for group in ("", "model.", "data.", "checkpoint.", "trainer."):
        options = [f"--{n}" for n in names if (n.startswith(group) if group else "." not in n)]
        lines += textwrap.wrap(", ".join(options), 120, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line for k, line in enumerate(lines) if line or not k)


def prepare(folder: Path, cli: Any, resume: str) -> str | None:
    """Make the folder ready; returns the checkpoint to go on from."""
    last = folder / "last.ckpt"
    if resume not in ("auto", "none"):
        if not Path(resume).exists():
            raise Problem(f"--resume {resume}: there is no such checkpoint; it is auto, none or the path of one")
        folder.mkdir(parents=True, exist_ok=True)
        return resume
    if resume == "auto" and last.exists():
        before, now = _options(folder / "config.yaml"), json.loads(json.dumps(cli.config.clone().as_dict(), default=str))
        changed = [
            f"--{part}.{k} was {v}, now {now[part].get(k)}"
            for part in ("model", "data")
            for k, v in before.get(part, {}).items()
            if v != now[part].get(k)
        ]
        if changed:
            raise Problem(
                f"{folder} was run with other options: {'; '.join(changed)}\n"
                "name another run (--run), start over (--resume none), or force it (--resume " + str(last) + ")"
            )
        return str(last)
    if rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("last.ckpt", "exception.ckpt", "metrics.csv", "result.json", "config.yaml"):
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return None


def _options(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text()) if path.exists() else {}


def judge(recipe: Recipe, cli: Any, result: dict[str, Any], folder: Path) -> int:
    """Print the result beside its floor and what it is compared with, and record both."""
    floor = recipe.floor
    value = result[floor.metric]
    defaults = cli.parser.get_defaults()
    lengths = [*(f"trainer.{k}" for k in LENGTH), *recipe.length]
    shortened = [f"--{k}" for k in lengths if _shorter(k, cli.config[k], defaults[k])]
    reached, bound = floor.judge(result)
    if result["smoke"] or shortened:
        verdict, status = "not judged: " + ("smoke" if result["smoke"] else "shortened by " + ", ".join(shortened)), 0
    else:
        verdict, status = ("reached", 0) if reached else ("MISSED", 1)
    result["floor"] = {"metric": floor.metric, "bound": bound, "verdict": verdict}
    save_json(folder / "result.json", result)
    rows = [(floor.label, value), *result.get("beside", {}).items()]
    width = max(len(label) for label, _ in rows)
    for k, (label, figure) in enumerate(rows):
        say(f"  {label.ljust(width)}  {figure:7.3f} {floor.unit}" + (f"   floor {bound}: {verdict}" if k == 0 else ""))
    say(f"{result['steps']} steps, {result['seconds']} s, in {folder}")
    return status


def _shorter(option: str, value: Any, default: Any) -> bool:
    """Whether an option makes the run shorter than the recipe's own."""
    if value == default:
        return False
    if option in ("trainer.max_epochs", "trainer.max_steps") and isinstance(value, int) and isinstance(default, int):
        return 0 <= value < default or default < 0 <= value
    return True


def layers_used(model: Any) -> str:
    """Whose layers run, in words."""
    report = getattr(model, "swapped", None)
    return "torch's layers" if report is None else f"bptoolkit's layers: {report.summary().split(';')[0]}"


def versions(data: Any) -> dict[str, Any]:
    """What the run depends on."""
    import torch

    from bptoolkit import __version__

    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(), "bptoolkit": __version__}
    for name in ("torch", "lightning", "triton", "numpy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["threads"] = torch.get_num_threads()
    found["data"] = data.fingerprint
    return found


def rank_zero() -> bool:
    """Whether this process is the first of a distributed run; asked before there is a Trainer."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))


def save_json(path: Path, what: dict[str, Any]) -> None:
    path.write_text(json.dumps(what, indent=2) + "\n")


def say(line: str) -> None:
    print(line, flush=True)


def quiet() -> None:
    """Leave out what Lightning says about every run."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|lightning")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
