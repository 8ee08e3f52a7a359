"""A head's files, written whole and read strictly: nothing is guessed, nothing that does not fit is loaded."""

import dataclasses
import functools
import hashlib
import os
import stat
import warnings
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from .config_checks import shown
from .custom_generate import GENERATE_NAME, check_can_stand_alone, standalone_generate
from .errors import HeadError, HeadUnavailable
from .head_config import HeadConfig
from .head_format import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    WEIGHTS_NAME,
    WrongHash,
    check_hash,
    check_values,
    parse_config,
    parse_weights,
    size_limit_of_weights,
)
from .head_hub import CARD_NAME, FolderHead, HubHead, is_hub_id, locate, package_version, too_large
from .head_push import check_card, push_files
from .model_card import CardFacts, card, is_as_written


def edited_card(folder: Path) -> str | None:
    """The card that a person edited in a head's folder; None where there is none, or one as it was written.

    Raises:
        ValueError: it is no UTF-8.
    """
    path = folder / CARD_NAME
    if not path.is_file() or is_as_written(data := path.read_bytes()):
        return None
    check_card(data)
    return data.decode("utf-8")


class HeadFiles(nn.Module):
    """save_pretrained, from_pretrained and push_to_hub of a head; a subclass names its kind's config."""

    config_class: ClassVar[type[HeadConfig]] = HeadConfig
    config: HeadConfig
    _classes: ClassVar[dict[str, type["HeadFiles"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        HeadFiles._classes.setdefault(cls.config_class.kind, cls)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        replace_model_card: bool = False,
        custom_generate: bool = False,
    ) -> None:
        """Write config.json, model.safetensors (float32) and README.md into a folder, and read them back.

        Overwrites an older head there; each file is replaced as a whole. A README.md that was edited by hand stays.

        Args:
            save_directory: made if it does not exist.
            push_to_hub: afterwards, send the three files of the folder to the Hub, as `push_to_hub` does.
            repo_id: where to push; the folder's name where None.
            revision: branch to push to, and the rest: see `push_to_hub`.
            replace_model_card: write README.md anew, here and on the Hub, whoever wrote the one that is there.
            custom_generate: with push_to_hub, as there. In a folder it would not know where the weights are.

        Raises:
            ValueError: custom_generate without push_to_hub.
            HeadError: a weight is NaN, infinite or beyond 1e4, or weights and config do not fit, or the head cannot
                have a custom_generate. Nothing is written.
            HeadUnavailable: the files were written, but not pushed.
        """
        directory = Path(save_directory)
        config_bytes, weights = self._to_bytes()
        if custom_generate and not push_to_hub:
            raise ValueError("custom_generate is for a repository on the Hub. Pass push_to_hub=True too.")
        if custom_generate:
            self._check_can_stand_alone()
        directory.mkdir(parents=True, exist_ok=True)
        # Weights first: beside an older config.json they are refused by their hash, never taken for its own.
        _write_whole(directory / WEIGHTS_NAME, weights)
        _write_whole(directory / CONFIG_NAME, config_bytes)
        card_path = directory / CARD_NAME
        name = repo_id or directory.resolve().name
        if replace_model_card or not card_path.exists() or is_as_written(card_path.read_bytes()):
            text = self.model_card(name if push_to_hub else None, custom_generate=custom_generate)
            _write_whole(card_path, text.encode())
        _read_head(FolderHead(directory), self.config_class)
        if push_to_hub:
            self.push_to_hub(
                name,
                revision=revision,
                token=token,
                private=private,
                commit_message=commit_message,
                create_pr=create_pr,
                replace_model_card=replace_model_card,
                custom_generate=custom_generate,
                model_card=edited_card(directory),
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """The head in a folder or a Hub repository, in float32, on the CPU, in eval mode; of either kind from `Head`.

        Reads config.json and model.safetensors and nothing else, both from one commit, and checks everything before any
        weight is used: hash, config, names, shapes, dtypes, finite values. Draws no random number.

        Args:
            pretrained_model_name_or_path: a folder (which wins over a repository of the same name), "user/head", or
                "user/head@revision".
            revision: branch, tag or commit; the repository's main branch where None.
            token: for private and gated repositories; the one of `hf auth login` where None.
            subfolder: where in the folder or repository the head is.
            cache_dir: where downloads are kept; the Hub's own cache where None.
            local_files_only: no request; what the cache has.

        Raises:
            HeadError: what is there is not a sound head.
            HeadUnavailable: it cannot be fetched; the Hub's error is the cause.
            ValueError: a revision in the name and as an argument, or a revision of a folder.
        """
        source = locate(
            pretrained_model_name_or_path,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        # A caller may stand in inference_mode or have another default device: a head is an ordinary one on the CPU.
        with torch.inference_mode(False):
            try:
                config, tensors = _read_head(source, cls.config_class)
            except HeadError as error:
                raise HeadError(f"The head in {source} cannot be loaded. {error}") from error.__cause__
            with torch.device("meta"):  # no memory, and no random numbers, for weights that are replaced at once
                head: Any = (cls if cls.config_class.kind == config.kind else cls._classes[config.kind])(config)
            head.load_state_dict(tensors, strict=True, assign=True)
        return head.eval()  # type: ignore[no-any-return]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        replace_model_card: bool = False,
        custom_generate: bool = False,
        model_card: str | None = None,
    ) -> str:
        """Send config.json, model.safetensors and a card to the Hub in one commit.

        Args:
            repo_id: "user/head"; made if it does not exist.
            revision: branch, made if it does not exist; the main branch where None.
            token: with the right to write; the one of `hf auth login` where None.
            private: of a repository that is made; the Hub's default for the account where None.
            commit_message: "Upload a head" where None.
            create_pr: open a pull request instead of committing.
            replace_model_card: write the repository's card anew, even if it was edited by hand.
            custom_generate: afterwards send custom_generate/generate.py, which steers as the head does by default where
                this package is not installed: `model.generate(custom_generate="user/head", trust_remote_code=True)`.
                Whoever calls that runs the repository's code. Otherwise a generate.py that is there is taken away.
            model_card: the card's text, which takes the place of any card there; that of `model_card` where None.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            HeadError: a weight is NaN, infinite or beyond 1e4; or custom_generate is asked for and the head's defaults
                do not steer, or have a max_relative_norm, regularization or target_value, which it does not support.
            HeadUnavailable: no network, no token, or no right to write.
        """
        config_bytes, weights = self._to_bytes()
        if custom_generate:
            self._check_can_stand_alone()
        self._warn_of_local_base_model()
        text = self.model_card(repo_id) if model_card is None else model_card
        return push_files(
            repo_id,
            {CONFIG_NAME: config_bytes, WEIGHTS_NAME: weights, CARD_NAME: text.encode()},
            revision=revision,
            token=token,
            private=private,
            commit_message=commit_message,
            create_pr=create_pr,
            replace_model_card=replace_model_card or model_card is not None,
            second=functools.partial(self._second, weights, model_card) if custom_generate else None,
        )

    def is_zero(self) -> bool:
        """Whether it steers nowhere, whatever the defaults."""
        return False

    def _check_can_stand_alone(self) -> None:
        if self.is_zero():
            raise HeadError("The head is 0 everywhere, so its custom_generate would give plain text. Train it first.")
        check_can_stand_alone(self.config)

    def _second(self, weights: bytes, model_card: str | None, repo_id: str, commit: str) -> dict[str, bytes]:
        """What is pushed after the head of that commit: generate.py, and the card that speaks of it."""
        base_model = self.config.base_model_name_or_path
        generate = standalone_generate(
            self.config,
            repo_id=repo_id,
            revision=commit,
            sha256=hashlib.sha256(weights).hexdigest(),
            base_model=base_model if is_hub_id(base_model) else None,
            version=package_version(),
        )
        text = self.model_card(repo_id, custom_generate=True) if model_card is None else model_card
        return {GENERATE_NAME: generate.encode(), CARD_NAME: text.encode()}

    def model_card(self, repo_id: str | None = None, *, custom_generate: bool = False) -> str:
        """The text of README.md: what the config says, with the Hub's YAML. What is not known is left out."""
        config, control = self.config, self.config.control
        base_model = config.base_model_name_or_path
        on_hub = is_hub_id(base_model)
        return card(
            CardFacts(
                repo_id=repo_id,
                kind=config.kind,
                base_model=base_model if on_hub else None,
                base_model_revision=config.base_model_revision if on_hub else None,
                reward=config.reward.name,
                reward_mean=config.reward.mean,
                reward_std=config.reward.std,
                head=self._in_words(),
                step_size=getattr(control, "step_size", None),
                num_steps=getattr(control, "num_steps", None),
                scale=getattr(control, "scale", None),
                strength=control.strength,
                calibration=control.calibration,
                custom_generate=custom_generate,
                info=config.info,
            )
        )

    def _in_words(self) -> str:
        """The head's shape, for its card."""
        config, rank = self.config, getattr(self.config, "rank", None)
        if rank == 0:
            return f"one constant vector of {config.hidden_size}"
        plural = "s" if config.num_hidden_layers > 1 else ""
        layers = f"{config.num_hidden_layers} hidden layer{plural} of {config.width}, {config.hidden_act}"
        linear = "linear" + (f" of rank {rank}" if rank else "")
        return f"{config.hidden_size} inputs, " + (layers if config.num_hidden_layers else linear)

    def _warn_of_local_base_model(self) -> None:
        base_model = self.config.base_model_name_or_path
        if base_model is not None and not is_hub_id(base_model):
            warnings.warn(
                f"The base model {shown(base_model)} is not the id of a Hub repository, so the card names none, and "
                f"{CONFIG_NAME} shows a path of this machine. Set head.config.base_model_name_or_path to its id on the "
                "Hub, or to None.",
                stacklevel=3,
            )

    def _to_bytes(self) -> tuple[bytes, bytes]:
        """config.json and model.safetensors as the strict loader accepts them."""
        tensors = {
            name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in self.state_dict().items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != self.config.tensor_shapes():
            raise HeadError(
                f"The head's weights are {shown(shapes)}, but its config says {shown(self.config.tensor_shapes())}. "
                "Make the head anew from its config; it was not saved."
            )
        check_values(tensors)
        ordered = {name: tensor.contiguous() for name, tensor in tensors.items()}
        weights: bytes = safetensors_torch.save(ordered, metadata={"format": "pt"})
        config = dataclasses.replace(
            self.config, weights_sha256=hashlib.sha256(weights).hexdigest(), hf_recontrol_version=package_version()
        )
        config_bytes = config.to_json_string().encode()
        parse_config(config_bytes, self.config_class)  # what would not load is not saved
        return config_bytes, weights


def _read_head(source: FolderHead | HubHead, config_class: type[HeadConfig]) -> tuple[Any, dict[str, Tensor]]:
    """The config and the weights, checked; read again if they do not belong together.

    Then the cache is damaged, or the head was being saved while it was read.
    """
    try:
        return _read_once(source, config_class)
    except WrongHash as wrong:
        try:
            return _read_once(source, config_class, again=True)
        except HeadUnavailable:
            raise wrong from None


def _read_once(
    source: FolderHead | HubHead, config_class: type[HeadConfig], *, again: bool = False
) -> tuple[Any, dict[str, Tensor]]:
    """The order is the point: nothing is allocated, parsed or computed from what was not checked before."""
    config = _read_config(source, config_class, again=again)
    limit = size_limit_of_weights(config)
    weights = _read_file(source.path(WEIGHTS_NAME, limit, again=again), limit)
    check_hash(weights, config)
    return config, parse_weights(weights, config)


def _read_config(source: FolderHead | HubHead, config_class: type[HeadConfig], *, again: bool) -> HeadConfig:
    """Has no hash that would tell damage from malice: what is no config is fetched from the Hub once more."""
    data = _read_file(source.path(CONFIG_NAME, MAX_CONFIG_BYTES, again=again), MAX_CONFIG_BYTES)
    try:
        return parse_config(data, config_class)
    except HeadError as wrong:
        if again or isinstance(source, FolderHead):
            raise
        try:
            return _read_config(source, config_class, again=True)
        except HeadUnavailable:
            raise wrong from wrong.__cause__


def _read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file, read once: a map of it would change, or kill the process, when the file changes."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise HeadError(f"Its {path.name} is not a regular file. Put the file itself there.")
            data = file.read(status.st_size + 1) if status.st_size <= limit else b""
    except OSError as error:
        raise HeadError(
            f"Its {path.name} cannot be read ({type(error).__name__}). Expected a readable file."
        ) from error
    size = max(status.st_size, len(data))
    if size > limit:
        raise too_large(path.name, size, limit)
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a FIFO would wait for its writer


def _write_whole(path: Path, data: bytes) -> None:
    """Replace a file by `data`: a reader, or a crash at any moment, finds the old one or the new one."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
