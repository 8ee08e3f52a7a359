"""What fitting a control takes: the language model's logits at stored states, the objective, and its closed form.

The control reaches a text through the next token only: J(u) = E_{y ~ p_u}[A(h, y)] with p_u = softmax(W(h + u)) and A
the advantage of token y. Its gradient at u = 0 is Cov_p(W_y, A), which is not ∇V(h); per nat of KL the best small shift
is F⁻¹ Cov_p(W_y, A) with F = Cov_p(W_y), the natural gradient (Amari 1998; Kakade 2001).
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .answers import evaluating
from .control import Controller
from .control_checks import check_control_inputs, check_lm_head, check_rewards_differ
from .control_config import as_float
from .control_head import ControlHead
from .fitting import batches, check_answers, fit_linear_head, float64_device, set_scales
from .forwards import logits_at_once, logits_of, steered_logits
from .head_config import ControlHeadConfig
from .kl_bound import kl_of_logs, log_softmax
from .objectives import answer_sums, clipped_gain, lambda_returns
from .value_head import ValueHead


class Terms(NamedTuple):
    """What the objective is made of at each token, float (tokens,)."""

    log_ratios: Tensor
    """log p_u(y) − log p_old(y), p_old the distribution that y was sampled from."""
    kl: Tensor
    """KL(p_u ‖ p_base), nats."""


def policy_terms(
    model: PreTrainedModel, hidden_states: Tensor, u: Tensor, token_ids: Tensor, behavior: Controller | None = None
) -> Terms:
    """log ρ and KL at some tokens, by the model's own LM head and what it does after it; differentiable in u.

    Args:
        model: the base model.
        hidden_states: float (tokens, hidden_size).
        u: the control, float (tokens, hidden_size).
        token_ids: long (tokens,), those that were chosen.
        behavior: the control they were chosen under; None is none.
    """
    tokens = token_ids.to(model.device)[:, None]
    with torch.no_grad():
        base = log_softmax(logits_of(model, hidden_states))
        old = base if behavior is None else log_softmax(steered_logits(model, hidden_states, behavior))
    steered = log_softmax(logits_of(model, hidden_states.to(u) + u))
    log_ratios = (steered.gather(1, tokens) - old.gather(1, tokens)).squeeze(1)
    return Terms(log_ratios.to(u.device), kl_of_logs(steered, base).to(u.device))


def policy_losses(
    model: PreTrainedModel,
    hidden_states: Tensor,
    u: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    clip_ratio: float,
    behavior: Controller | None = None,
) -> Tensor:
    """−min(ρA, clip(ρ, 1/c, c)A) + β KL(p_u ‖ p_base) at each token, (tokens,). Its gradient reaches u and no weight.

    The logits of a few tokens at a time are held: memory does not grow with tokens × vocabulary.
    """
    losses, gradients = [], []
    pieces = [x.split(logits_at_once(model)) for x in (hidden_states, u, token_ids, advantages)]
    for states, shift, tokens, advantage in zip(*pieces, strict=True):
        with torch.enable_grad(), torch.autocast(u.device.type, enabled=False):
            shift = shift.detach().requires_grad_()
            terms = policy_terms(model, states, shift, tokens, behavior)
            loss = beta * terms.kl - clipped_gain(terms.log_ratios, advantage, clip_ratio)
            (gradient,) = torch.autograd.grad(loss.sum(), shift)
        losses.append(loss.detach())
        gradients.append(gradient)
    through = (u * torch.cat(gradients)).sum(-1)  # each token's loss depends on its own u: this has its gradient
    return torch.cat(losses) + through - through.detach()


def scores(model: PreTrainedModel, hidden_states: Tensor, token_ids: Tensor) -> Tensor:
    """∇_h log p(y | h) of each token, float32 (tokens, hidden_size): W_y − E_p W where the LM head is linear."""
    gradients: list[Tensor] = []
    for states, tokens in zip(*(x.split(logits_at_once(model)) for x in (hidden_states, token_ids)), strict=True):
        with torch.enable_grad():
            h = states.to(model.device).float().requires_grad_()
            log_p = log_softmax(logits_of(model, h)).gather(1, tokens.to(model.device)[:, None])
            gradients += torch.autograd.grad(log_p.sum(), h)
    return torch.cat(gradients)


def advantages_of(critic: ValueHead, batch: dict[str, Tensor], td_lambda: float, gamma: float = 1.0) -> Tensor:
    """A_t = G_t^λ − V(s_t), float (tokens,), in standard deviations of the critic's reward."""
    scale = critic.config.reward
    with torch.no_grad():
        values = critic(batch["hidden_states"])
        rewards = (batch["rewards"] - scale.mean) / scale.std
        advantages: Tensor = lambda_returns(values, rewards, batch["offsets"], td_lambda, gamma) - values
    return advantages


def fit_constant_control(
    train_dataset: Any,
    base_model: PreTrainedModel,
    *,
    critic: ValueHead | None = None,
    beta: float = 0.3,
    td_lambda: float = 1.0,
    ridge: float = 1e-3,
) -> ControlHead:
    """u = F⁻¹g / β in closed form: the constant control that gains most per nat, for small shifts. No randomness.

    With s_t = ∇_h log p(y_t | h_t): g = E[A_t s_t] is the policy gradient at u = 0 and F = E[s_t s_tᵀ] the Fisher
    information, so u maximises the expected gain, to first order, less β times the KL, to second. It is the ridge
    regression of the advantages on the scores, the compatible approximation of Kakade (2001). One pass over the
    rollouts.

    Args:
        train_dataset: a RolloutDataset of the base model, or a Subset or ConcatDataset of them.
        base_model: the language model of the rollouts; its LM head, and what it does after it, is used.
        critic: V, for A_t = G_t^λ − V(s_t); a linear one is fitted where None.
        beta: what a nat costs, > 0, in standard deviations of the reward: the scale of u.
        td_lambda: λ of the returns, 0 to 1.
        ridge: ≥ 0, in units of F's mean diagonal.

    Returns:
        A ControlHead of rank 0, float32, on the CPU, in eval mode; not calibrated.

    Raises:
        HeadMismatch: hidden states of several widths, or of another model.
        TypeError, ValueError: no answers, rewards that are all equal, answers under a control or of another sampling
            than temperature 1, or arguments out of bounds.
    """
    for name, value, holds, wanted in (
        ("beta", beta, 0 < as_float(beta) < math.inf, "a finite number > 0"),
        ("ridge", ridge, 0 <= as_float(ridge) < math.inf, "a finite number ≥ 0"),
        ("td_lambda", td_lambda, 0 <= as_float(td_lambda) <= 1, "from 0 to 1"),
    ):
        if not holds:
            raise ValueError(f"{name} is {value!r}; it must be {wanted}.")
    if base_model is None:
        raise TypeError("base_model is None; pass the transformers model that wrote the rollouts.")
    check_control_inputs(base_model, critic)
    check_answers(train_dataset, "train_dataset")
    check_rewards_differ(train_dataset)
    check_lm_head(base_model, train_dataset)
    width = train_dataset[0]["hidden_states"].shape[-1]
    head = ControlHead(ControlHeadConfig(hidden_size=width, num_hidden_layers=0, rank=0))
    set_scales(head, train_dataset, standardize_inputs=False)
    critic = critic or fit_linear_head(train_dataset, reward=head.config.reward)
    start_from_constant(head, train_dataset, base_model, critic, beta=beta, td_lambda=td_lambda, ridge=ridge)
    head.config.info["training"] = {
        "recipe": "natural gradient in closed form",
        "beta": float(beta),
        "td_lambda": float(td_lambda),
        "ridge": float(ridge),
        "answers": len(train_dataset),
    }
    return head.eval()


def start_from_constant(
    head: ControlHead,
    dataset: Any,
    base_model: PreTrainedModel,
    critic: ValueHead,
    *,
    beta: float,
    td_lambda: float,
    gamma: float = 1.0,
    ridge: float = 1e-3,
) -> None:
    """Write into a head the units of u, and the constant of fit_constant_control as its bias.

    `output_scale` becomes 1/√(d Fᵢᵢ), so that an output of mean square 1 costs about half a nat a token: then one
    learning rate suits every model, whatever the size of its hidden states and of its LM head's weights.
    """
    width, tokens = head.config.hidden_size, 0
    device = float64_device(base_model.device)
    gradient, fisher = (torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((width,), (width, width)))
    with evaluating(base_model):
        for batch in batches(dataset):
            batch = {name: tensor.to(critic.input_mean.device) for name, tensor in batch.items()}
            s = scores(base_model, batch["hidden_states"], batch["token_ids"]).to(device).double()
            gradient += advantages_of(critic, batch, td_lambda, gamma).to(s) @ s
            fisher += s.T @ s
            tokens += len(s)
    fisher, gradient = fisher.cpu() / tokens, gradient.cpu()
    spread = fisher.diagonal()
    damped = fisher + max(ridge, 1e-12) * spread.mean() * torch.eye(width, dtype=torch.float64)
    u = torch.linalg.solve(damped, gradient / tokens) / beta
    if not u.isfinite().all():
        raise ValueError("The rollouts hold hidden states or rewards that are not finite numbers. Collect them again.")
    scale = (width * spread.clamp(min=1e-6 * float(spread.mean()))).rsqrt()
    with torch.no_grad():
        head.output_scale.copy_(scale)
        head.bias.copy_(u / scale)


class ControlObjective:
    """Minimises the mean over tokens of −min(ρA, clip(ρ, 1/c, c)A) + β KL(p_u ‖ p_base). See policy_losses.

    Args:
        base_model: its LM head turns states into logits; never changed.
        critic: V of the advantages A.
        behavior: the control that the answers were sampled under.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        critic: ValueHead,
        behavior: Controller | None,
        *,
        td_lambda: float,
        gamma: float = 1.0,
        beta: float,
        clip_ratio: float,
        device: torch.device,
    ):
        self.base_model = base_model
        self.behavior = copy.deepcopy(behavior)  # it may hold the very head that is trained
        self.critic = copy.deepcopy(critic).to(device).eval()
        self.td_lambda, self.gamma, self.beta, self.clip_ratio = td_lambda, gamma, beta, clip_ratio

    def start(self, head: ControlHead, dataset: Any) -> None:
        """Let a head that is 0 begin at the best constant, where the answers are the base model's."""
        if not head.is_zero():
            return
        options = {"beta": self.beta, "td_lambda": self.td_lambda, "gamma": self.gamma}
        start_from_constant(head, dataset, self.base_model, self.critic, **options)
        if self.behavior is not None:  # the gradient at u = 0 is of other answers
            nn.init.zeros_(head.bias)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Of each token, (tokens,)."""
        states = batch["hidden_states"]
        advantages = advantages_of(self.critic, batch, self.td_lambda, self.gamma)
        with evaluating(self.base_model):
            return policy_losses(
                self.base_model,
                states,
                model(states),
                batch["token_ids"],
                advantages,
                beta=self.beta,
                clip_ratio=self.clip_ratio,
                behavior=self.behavior,
            )

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What `metrics` reads of each token: log ρ, KL, A; float32 (tokens, 3)."""
        states, size = batch["hidden_states"], logits_at_once(self.base_model)
        advantages = advantages_of(self.critic, batch, self.td_lambda, self.gamma)
        with torch.no_grad(), evaluating(self.base_model):
            pieces = zip(*(x.split(size) for x in (states, model(states), batch["token_ids"])), strict=True)
            parts = [
                torch.stack(policy_terms(self.base_model, h, u, tokens, self.behavior), dim=-1)
                for h, u, tokens in pieces
            ]
        return torch.cat([torch.cat(parts), advantages[:, None]], dim=-1).float()

    def metrics(self, observed: Tensor, rewards: Tensor, offsets: Tensor) -> dict[str, float]:
        """Of held-out answers, at scale 1.

        loss: the objective, mean over tokens. gain: mean over answers of Σ (ρ − 1) A, what an answer's reward should
        gain over the control that the answers were sampled under, in standard deviations. kl_per_token, kl_per_answer:
        from the base model, nats. clipped: the share of tokens whose ρ is beyond the range.
        """
        log_ratios, kl, advantages = observed.double().unbind(-1)
        answers = len(offsets) - 1
        losses = self.beta * kl - clipped_gain(log_ratios, advantages, self.clip_ratio)
        return {
            "loss": float(losses.mean()),
            "gain": float(((log_ratios.exp() - 1) * advantages).sum()) / answers,
            "kl_per_token": float(kl.mean()),
            "kl_per_answer": float(kl.sum()) / answers,
            "clipped": float((log_ratios.abs() > math.log(self.clip_ratio)).double().mean()),
        }

    def ratios(self, observed: Tensor, rewards: Tensor, offsets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The metrics that are a ratio of sums over answers: float64 (answers,) each. For their intervals."""
        log_ratios, kl, advantages = observed.double().unbind(-1)
        gains, spent = answer_sums((log_ratios.exp() - 1) * advantages, offsets), answer_sums(kl, offsets)
        answers = torch.ones_like(gains)
        return {
            "gain": (gains, answers),
            "kl_per_answer": (spent, answers),
            "kl_per_token": (spent, offsets.diff().double()),
        }
