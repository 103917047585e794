"""Split a rollout into the micro-batches of its optimizer steps."""

import torch


def micro_batches(
    rollout: dict[str, torch.Tensor], num_batches: int, num_steps: int, keeps_padding: bool = False
) -> list[dict[str, torch.Tensor]]:
    """
    Split a rollout into shuffled micro-batches without needless padding.

    Within one optimizer step, the completions of a prompt and prompts of similar length are placed together. This saves
    padding and repeated prompts and changes no sum.

    Args:
        rollout (`dict[str, torch.Tensor]`):
            Tensors with one row a completion: `prompt_ids` (padded to the left), `completion_ids` (padded to the
            right), their masks, `advantages` and whatever else the loss needs. Rows whose `weights`, on the CPU, are
            0 are left out; without `weights` all have the weight 1.
        num_batches (`int`):
            Number of micro-batches.
        num_steps (`int`):
            Number of optimizer steps that they make up.
        keeps_padding (`bool`, *optional*, defaults to `False`):
            Whether columns that are padding in every row stay.

    Returns:
        `list[dict[str, torch.Tensor]]`: The micro-batches, equal in size up to one row. With `weights` each has a
        `loss_weight`, by which the mean over its rows is multiplied, so that the mean over the micro-batches is the
        weighted mean over the rollout. A micro-batch for which no row is left has one of weight 0, because every
        process takes part in every backward.
    """
    rollout = dict(rollout)
    weights = rollout.pop("weights", None)
    num_rows = len(rollout["advantages"])
    order = torch.randperm(num_rows)
    if weights is not None:
        order = order[weights[order] > 0]
    prompts = [
        ids[mask].tolist() for ids, mask in zip(rollout["prompt_ids"], rollout["prompt_mask"].bool(), strict=True)
    ]
    batches = []
    for step in order.tensor_split(num_steps):
        rows = torch.tensor(sorted(step.tolist(), key=lambda row: (len(prompts[row]), prompts[row])), dtype=torch.long)
        for chosen in rows.tensor_split(num_batches // num_steps):
            weight = 1.0 if weights is None else weights[chosen].sum().item() * num_batches / num_rows
            if not len(chosen):
                chosen = torch.zeros(1, dtype=torch.long)
            batch = {name: tensor[chosen] for name, tensor in rollout.items()}
            if weights is not None:
                batch["loss_weight"] = batch["advantages"].new_tensor(weight)
            batches.append(batch if keeps_padding else _without_padding(batch))
    return batches


def _without_padding(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut off the columns that are padding in every row."""
    prompt_length = int(batch["prompt_mask"].sum(1).max())
    completion_length = max(1, int(batch["completion_mask"].sum(1).max()))
    for name in ("prompt_ids", "prompt_mask"):
        batch[name] = batch[name][:, -prompt_length:]
    for name in ("completion_ids", "completion_mask", "old_per_token_logps", "sampling_per_token_logps"):
        if name in batch:
            batch[name] = batch[name][:, :completion_length]
    return batch
