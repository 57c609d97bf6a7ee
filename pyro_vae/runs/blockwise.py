"""An estimate in files: its parts are computed each by one of several processes, and outlive who computed them."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, save

import pyro_vae
from pyro_vae.errors import ContractError, RunError
from pyro_vae.files import bytes_in, whole
from pyro_vae.infer.evidence.blocks import Part
from pyro_vae.runs.directory import check_empty, write_text
from pyro_vae.runs.workers import Taken, claim

FOLDER = "blocks"
"""The folder, in the directory of an estimate on its way, of what has been computed of it."""
FORMAT = 1
POLL = 0.05
"""Seconds between looks at what others do."""


class Overtaken(Exception):
    """The estimate is finished: others have written its result."""


class Files:
    """Who computes the parts of an estimate, as :class:`pyro_vae.infer.evidence.blocks.Work` asks for it.

    Each part is a file, written whole, with a checksum, and with what it belongs to. Whoever finds a part missing, or
    damaged, or of something else, claims it and computes it; a dead process loses its claim. All processes read all
    parts from the files.

    Args:
        directory: of the estimate, on a file system that all share.
        about: what the estimate is of, by name: settings, weights, data. Parts of another one are refused.
        device: of the parts.
        name: of the estimate, where there are several of the same.
        alone: whether nobody else is at work there: parts of another estimate are deleted then, and not refused.

    Raises:
        RunError: if there are parts of another estimate, or the folder cannot be written.
    """

    def __init__(
        self, directory: Path, about: Mapping[str, Any], device: torch.device, name: str = "", alone: bool = False
    ):
        self.folder, self.device, self._result = directory / FOLDER, device, directory / "result.json"
        self._prefix, self._alone = f"{name}-" if name else "", alone
        self._about = json.loads(json.dumps({"format": FORMAT} | dict(about)))
        self._key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
        try:
            self._open()
        except OSError as error:
            raise RunError(f"{self.folder}: {error.strerror or error}") from error

    def _open(self) -> None:
        if self.folder.is_symlink():
            raise RunError(f"{self.folder} is a link, which is not followed")
        self.folder.mkdir(parents=True, exist_ok=True)
        told = self.folder / "about.json"
        with contextlib.suppress(FileExistsError):
            write_text(told, json.dumps(self._about, indent=2) + "\n", new=True)
        try:
            known = json.loads(bytes_in(told))
        except ValueError:
            known = None
        if known != self._about and self._alone:
            self.forget()
            self._alone = False
            self._open()
        elif known != self._about:
            raise RunError(f"{self.folder} {_other(known, self._about)}; choose another directory, or delete it")

    def __call__(self, stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
        """``do(0)``, .., ``do(number - 1)``; see :class:`pyro_vae.infer.evidence.blocks.Work`.

        Raises:
            Overtaken: if others have finished the estimate in the meantime.
            ContractError, RunError: as ``do`` did, here or elsewhere.
        """
        left = dict.fromkeys(range(number))
        for wanted in range(number):
            while (part := self.read(stage, wanted)) is None:
                self._look()
                damaged = self._path(stage, wanted).exists()
                if not (damaged and self._compute(stage, do, wanted)) and not self._take(stage, do, left):
                    time.sleep(POLL)
            yield part

    def _take(self, stage: str, do: Callable[[int], Part], left: dict[int, None]) -> bool:
        """Compute the first of the parts that nobody has computed or is at work on, if there is one."""
        for number in list(left):
            if self._path(stage, number).exists():
                del left[number]
            elif self._compute(stage, do, number):
                return True
        return False

    def _compute(self, stage: str, do: Callable[[int], Part], number: int) -> bool:
        """Compute a part, unless somebody else does."""
        try:
            with claim(self.folder, self._path(stage, number).stem):
                if self.read(stage, number) is None:
                    self._look()  # what is finished is not begun again
                    self.write(stage, number, self._guarded(do, number))
                return True
        except Taken:
            return False

    def _guarded(self, do: Callable[[int], Part], number: int) -> Part:
        """Compute a part; what goes wrong is told to all others, who would meet it too."""
        try:
            return do(number)
        except Exception as error:
            told = as_told(error)
            with contextlib.suppress(OSError):
                failed = {"refused": isinstance(told, ContractError), "reason": str(told)}
                write_text(self._failure, json.dumps(failed))
            raise

    def _look(self) -> None:
        """See whether it is worth going on."""
        if self._result.exists():
            raise Overtaken
        try:
            failed = json.loads(self._failure.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        raise (ContractError if failed["refused"] else RunError)(failed["reason"])

    def begin(self) -> None:
        """Forget what went wrong before: it may have been the machine's fault."""
        self._failure.unlink(missing_ok=True)

    def finish(self, write: Callable[[], object]) -> bool:
        """Write the result of all parts, and delete these; whether it was done here, or by somebody else before."""
        while not self._result.exists():
            with contextlib.suppress(Taken), claim(self.folder, "result"):
                if not self._result.exists():
                    write()
                    self.forget()
                    return True
            time.sleep(POLL)
        self.forget()
        return False

    def forget(self) -> None:
        """Delete the parts."""
        forget_parts(self.folder.parent)

    def holds_any(self) -> bool:
        """Whether any part is finished."""
        return any(self.folder.glob("*.part"))

    @property
    def _failure(self) -> Path:
        return self.folder / f"{self._prefix}failed.json"

    def _path(self, stage: str, number: int) -> Path:
        return self.folder / f"{self._prefix}{stage}-{number}.part"

    def write(self, stage: str, number: int, part: Part) -> None:
        """Keep a part, which its :class:`Work` computed."""
        content = packed(part)
        try:
            with whole(self._path(stage, number)) as partial:
                partial.write_bytes(self._seal(stage, number, content) + content)
        except OSError as error:
            if self._result.exists():
                raise Overtaken from error
            raise RunError(f"{self.folder}: {error.strerror or error}") from error

    def read(self, stage: str, number: int) -> Part | None:
        """A part, if it is there, whole, and of this estimate."""
        path = self._path(stage, number)
        try:
            if path.is_symlink() or not path.is_file():
                return None
            content = path.read_bytes()
            if content[:32] != self._seal(stage, number, content[32:]):
                return None
            return {name: each.to(self.device) for name, each in load(content[32:]).items()}
        except (FileNotFoundError, SafetensorError):
            return None

    def _seal(self, stage: str, number: int, content: bytes) -> bytes:
        """A checksum of a part and of what it belongs to."""
        return hashlib.sha256(f"{self._key}/{self._prefix}{stage}/{number}/".encode() + content).digest()


def forget_parts(directory: Path) -> None:
    """Delete the parts of estimates that are finished, which a killed process may have left."""
    if not (directory / FOLDER).is_symlink():
        shutil.rmtree(directory / FOLDER, ignore_errors=True)


def packed(part: Part) -> bytes:
    """A part, from whatever device, as a file of safetensors."""
    # copies, since safetensors has no two names for one piece of memory
    return save({name: each.detach().cpu().clone().contiguous() for name, each in part.items()})


def as_told(error: Exception) -> ContractError | RunError:
    """What went wrong with a part, as all who share the work are told it: they would meet it too."""
    reason = " ".join(str(error).split())
    if isinstance(error, ContractError | ValueError | RunError):
        return ContractError(reason)
    return RunError(f"{type(error).__name__}: {reason}")


def _other(known: Any, about: dict[str, Any]) -> str:
    """How parts that were found differ from those that belong there."""
    if not isinstance(known, dict):
        return "holds parts of an estimate that cannot be told"
    name = next(name for name in {**about, **known} if known.get(name) != about.get(name))
    return f"holds parts of another estimate: {name} {known.get(name)}, now {about.get(name)}"


def check_home(directory: Path, text: str, joining: bool = False) -> None:
    """Check that ``directory`` can become, or is, the home of an evaluation on its way, with these settings as YAML.

    Args:
        directory: of the evaluation.
        text: its settings.
        joining: whether it is in work, so that somebody else may have finished it just now.

    Raises:
        RunError: if it holds anything else.
    """
    if not _is_of(directory, text) or ((directory / "result.json").exists() and not joining):
        check_empty(directory, "--name or --run_dir")


def is_finished(directory: Path, text: str) -> bool:
    """Whether ``directory`` holds the result of an evaluation with these settings as YAML."""
    return (directory / "result.json").exists() and _is_of(directory, text)


def _is_of(directory: Path, text: str) -> bool:
    """Whether these settings are those that are in a directory; what is wrong with them is told elsewhere."""
    try:
        known, asked = (yaml.safe_load(each) for each in (bytes_in(directory / "config.yaml").decode("utf-8"), text))
        return _resolved(known) == _resolved(asked)
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _resolved(settings: Any) -> dict[str, Any]:
    """Settings with the run's directory as it is found from anywhere."""
    if not isinstance(settings, dict):
        raise ValueError("no settings")
    return settings | {"run": str(Path(settings.get("run", "")).resolve())}


def fingerprint(weights: Path) -> str:
    """A short hash of a file of weights."""
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@cache
def code() -> str:
    """The versions of this library and of torch, and a short hash of the source of the former."""
    root, known = Path(pyro_vae.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        known.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"pyro_vae {pyro_vae.__version__} ({known.hexdigest()[:16]}), torch {torch.__version__}"


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Context: on a CPU this process computes with one thread, so that no digit depends on how work is divided."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
