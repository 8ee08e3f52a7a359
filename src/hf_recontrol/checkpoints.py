"""What RecontrolTrainer writes, reads back and sends: checkpoints that are heads, the newest whole one, the Hub."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .errors import HeadMismatch, HeadUnavailable
from .head import Head
from .head_files import edited_card
from .head_format import CONFIG_NAME, WEIGHTS_NAME
from .head_hub import CARD_NAME
from .head_push import push_files
from .training_args import RecontrolTrainingArguments


def newest_complete_checkpoint(output_dir: str | Path, *, save_only_model: bool = False) -> str:
    """The checkpoint folder with the most steps that is whole: its trainer_state.json, the last file to be written, can
    be read, and the head and the optimiser's state are there.

    A run that was killed while it saved, or deleted an older checkpoint, leaves a folder that is not.

    Args:
        save_only_model: as in the arguments of the run: there is no state of an optimiser.

    Raises:
        ValueError: there is none.
    """
    needed = [CONFIG_NAME, WEIGHTS_NAME, *([] if save_only_model else ["optimizer.pt", "scheduler.pt"])]
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdecimal()]
    for folder in sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True):
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all((folder / name).is_file() for name in needed):
            return str(folder)
    raise ValueError(
        f"{str(output_dir)!r} holds no complete checkpoint to resume from, of {len(folders)} begun. "
        "Start without resume_from_checkpoint."
    )


class HeadTrainer(Trainer):
    """A Trainer whose checkpoints are heads. See RecontrolTrainer."""

    model: Head
    args: RecontrolTrainingArguments

    def describe_run(self) -> None:
        """Write into head.config.info what is known of the run; called before the head is saved."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's. A folder that was there before is not whole until its last file is written again."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A folder that from_pretrained loads, read back through it. No training_args.bin: it is a pickle."""
        if not self.args.should_save:
            return
        if self.is_in_train:
            self.describe_run()
        self.model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved: Head = type(self.model).from_pretrained(resume_from_checkpoint)
        if saved.config.tensor_shapes() != self.model.config.tensor_shapes():
            raise HeadMismatch(
                f"The head in {resume_from_checkpoint!r} has the tensors {saved.config.tensor_shapes()}, but the one "
                f"in training {self.model.config.tensor_shapes()}. Make the head with the checkpoint's config."
            )
        self.model.load_state_dict(saved.state_dict())
        self.model.config.reward = saved.config.reward

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def create_model_card(  # type: ignore[override]  # the rest of what Trainer takes
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002
        *,
        dataset: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the head's card into output_dir, from head.config; one that was edited by hand stays.

        Args:
            language: of the texts, such as "en"; it is put into head.config.info too, as the next two are.
            license: of the head, such as "apache-2.0".
            dataset: what the rollouts' prompts are from: an id on the Hub.
            kwargs: what else Trainer takes, which the head's own card has no use for.
        """
        said = {"language": language, "license": license, "data": dataset}
        self.model.config.info.update({name: value for name, value in said.items() if value is not None})
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and edited_card(folder) is None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CARD_NAME).write_text(self.model.model_card(self._repo_id()), encoding="utf-8")

    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def push_to_hub(  # type: ignore[override]  # Trainer returns a CommitInfo
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        replace_model_card: bool = False,
    ) -> str | None:
        """Send the head's three files to the Hub in one commit, nothing else of output_dir. See Head.push_to_hub.

        Args:
            blocking: accepted as Trainer has it; a head is small, and this always waits.

        Returns:
            The URL of the commit; None on processes other than the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        url: str = self.model.push_to_hub(
            self._repo_id(),
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            commit_message=commit_message,
            replace_model_card=replace_model_card,
            model_card=None if replace_model_card else edited_card(Path(self.args.output_dir)),
        )
        return url

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send the two files that a head is loaded from; the card waits for push_to_hub and the final figures."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            push_files(
                self._repo_id(),
                {name: (Path(checkpoint_folder) / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)},
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                private=self.args.hub_private_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
            )
        except HeadUnavailable as error:  # the checkpoint is on the disk: the network need not end the training
            warnings.warn(f"Training goes on, but a push failed. {error}", stacklevel=2)
