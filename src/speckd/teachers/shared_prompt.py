"""The teacher's shared prompt computed once: rows that start with the same tokens read the same hidden states.

A batch is cut into *trunks*, the starts that several rows share, and *branches*, what each row has of its own after its trunk.
Two forwards compute it: the distinct trunks, padded on the left and kept in a cache, then the branches, padded on the right,
each with a copy of its trunk's cache. So a row's tokens stand side by side in every mask, whatever the lengths, as sliding
windows need. A row that shares nothing is a trunk without a branch.

Whether an architecture's cache can be continued like that is not read from its name: `why_not_shared` tries it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speckd.teachers.placement import moved

#: What the second forward costs, in token positions: about as many as a GPU computes while it reads the weights once more.
FORWARD_COST = 256

#: Shortest rows of which the proof can make two unequal trunks and four ragged branches.
SHORTEST_PROOF = 8


@dataclass(frozen=True)
class Sharing:
    """How a batch of B rows of L tokens is computed: G trunks of at most P tokens, R branches of at most S. All on the CPU.

    `trunk_ids`, `trunk_mask`: [G, P], padded on the left; `branch_ids`, `branch_positions`: [R, S], padded on the right;
    `branch_mask`: [R, P + S]; `parent`: [R], which trunk a branch continues; `source`: [B, L], where each token's state lies
    among the flattened trunks, then branches, then one row of zeros for the padding; `longest`: tokens of the longest row.
    """

    trunk_ids: Tensor
    trunk_mask: Tensor
    branch_ids: Tensor
    branch_mask: Tensor
    branch_positions: Tensor
    parent: Tensor
    source: Tensor
    longest: int

    @property
    def positions(self) -> int:
        """Token positions that are computed, padding included."""
        return self.trunk_ids.numel() + self.branch_ids.numel()


@dataclass(frozen=True)
class TeacherStates:
    """`hidden`: [B, L, H], the last hidden states; `positions`: how many token positions were computed, padding included."""

    hidden: Tensor
    positions: int


@dataclass(frozen=True)
class PromptSharing:
    """A decoder that computes shared starts once, where that is cheaper.

    Args:
        decoder: a frozen Transformers decoder (`model.get_decoder()`) in eval mode that `why_not_shared` found nothing against.
        longest: tokens of the longest rows that the proof covered; batches with longer rows are computed plainly.
        forward_cost: token positions that sharing must save to be worth its second forward.
    """

    decoder: Any
    longest: int
    forward_cost: int = FORWARD_COST

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> TeacherStates:
        """[B, L] ids and mask of an unpacked batch, padded on either side -> its states, those of the padding unspecified."""
        sharing = plan_sharing(input_ids, attention_mask, self.forward_cost)
        if sharing is None or sharing.longest > self.longest:
            return TeacherStates(plain_states(self.decoder, input_ids, attention_mask), input_ids.numel())
        return TeacherStates(shared_states(self.decoder, sharing, input_ids.device), sharing.positions)


def may_pay(rows: int, longest: int) -> bool:
    """Could batches of `rows` rows of at most `longest` tokens ever save more than the second forward costs?"""
    return (rows - 1) * longest > FORWARD_COST and longest >= SHORTEST_PROOF


# ---- the plan --------------------------------------------------------------------------------------------------------------


def plan_sharing(input_ids: Tensor, attention_mask: Tensor, forward_cost: int = FORWARD_COST) -> Sharing | None:
    """The cheapest way to share, or None where the plain forward is no dearer.

    The cost of a forward is its positions, padding included; a second forward costs `forward_cost` positions more. Rows are
    grouped by a common start of at least n tokens, for every n at which the groups change, and the cheapest n is taken.

    Args:
        input_ids, attention_mask: [B, L], any device; each row one run of attended tokens, else None is returned.
    """
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    first, length = mask.int().argmax(-1), mask.sum(-1)
    place = torch.arange(ids.shape[1]) - first[:, None]  # of a token in its own row, [B, L]
    if len(ids) < 2 or int(length.min()) == 0 or not torch.equal(mask, (place >= 0) & (place < length[:, None])):
        return None
    rows = [row[own] for row, own in zip(ids, mask, strict=True)]
    order, common = _sorted_with_common_starts(rows)
    best, least = None, ids.numel()
    for shortest in sorted(set(common) - {0}):
        groups = _groups(order, common, shortest, length.tolist())
        cost = _cost(groups, length.tolist(), forward_cost)
        if cost < least:
            best, least = groups, cost
    return None if best is None else _sharing(best, rows, place, length)


@dataclass(frozen=True)
class _Group:
    """Rows with one trunk of `trunk` tokens."""

    rows: list[int]
    trunk: int


def _sorted_with_common_starts(rows: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """The rows' numbers in the order of their tokens, so that common starts are neighbours, and how long neighbours agree."""
    tokens = [row.tolist() for row in rows]
    order = sorted(range(len(rows)), key=tokens.__getitem__)
    aligned = pad_sequence([rows[i] for i in order], batch_first=True, padding_value=-1)
    same = (aligned[1:] == aligned[:-1]) & (aligned[1:] != -1)
    return order, same.long().cumprod(-1).sum(-1).tolist()


def _groups(order: Sequence[int], common: Sequence[int], shortest: int, length: Sequence[int]) -> list[_Group]:
    """Neighbours that agree on at least `shortest` tokens stand together; a row alone is its own trunk."""
    groups = [_Group([order[0]], length[order[0]])]
    for row, agreed in zip(order[1:], common, strict=True):
        if agreed >= shortest:
            groups[-1] = _Group([*groups[-1].rows, row], min(groups[-1].trunk, agreed))
        else:
            groups.append(_Group([row], length[row]))
    return groups


def _cost(groups: Sequence[_Group], length: Sequence[int], forward_cost: int) -> int:
    branches = [length[row] - group.trunk for group in groups for row in group.rows if length[row] > group.trunk]
    second = len(branches) * max(branches) + forward_cost if branches else 0
    return len(groups) * max(group.trunk for group in groups) + second


def _sharing(groups: Sequence[_Group], rows: Sequence[Tensor], place: Tensor, length: Tensor) -> Sharing:
    trunks = [rows[group.rows[0]][: group.trunk] for group in groups]
    trunk_ids, trunk_mask = _padded(trunks, "left")
    group_of, trunk = torch.empty_like(length), torch.empty_like(length)
    for number, group in enumerate(groups):
        group_of[group.rows], trunk[group.rows] = number, group.trunk
    branching = (length > trunk).nonzero()[:, 0]
    parent, own = group_of[branching], trunk[branching]
    branch_ids, own_mask = _padded([rows[i][trunk[i] :] for i in branching.tolist()], "right")
    positions = own[:, None] + torch.arange(branch_ids.shape[1])
    return Sharing(
        trunk_ids,
        trunk_mask,
        branch_ids,
        torch.cat([trunk_mask[parent], own_mask], -1),
        torch.minimum(positions, length[branching, None] - 1),  # padding has no position of its own: there may be none left
        parent,
        _source(trunk_ids, branch_ids, group_of, trunk, branching, place, length),
        int(length.max()),
    )


def _source(
    trunk_ids: Tensor, branch_ids: Tensor, group_of: Tensor, trunk: Tensor, branching: Tensor, place: Tensor, length: Tensor
) -> Tensor:
    """[B, L]: where each token's state lies among the flattened trunks and branches; the place after them for padding."""
    width, after = trunk_ids.shape[1], trunk_ids.numel()
    branch_of = torch.zeros_like(length)
    branch_of[branching] = torch.arange(len(branching))
    in_trunk = (group_of * width + width - trunk)[:, None] + place
    in_branch = after + (branch_of * branch_ids.shape[1] - trunk)[:, None] + place
    found = in_trunk.where(place < trunk[:, None], in_branch)
    return found.where((place >= 0) & (place < length[:, None]), after + branch_ids.numel())


def _padded(pieces: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids (0 in the padding) and mask, [n, longest]; [0, 0] of nothing."""
    if not pieces:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)
    ids = pad_sequence(list(pieces), batch_first=True, padding_side=side)
    return ids, pad_sequence([torch.ones_like(piece) for piece in pieces], batch_first=True, padding_side=side)


# ---- the forwards ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, L] -> [B, L, H] by one forward of every row. Positions count attended tokens, also where padding stands first."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if not bool(attention_mask[:, 0].all()):
        given["position_ids"] = _positions(attention_mask)
    return decoder(**given).last_hidden_state


@torch.no_grad()
def shared_states(decoder: Any, sharing: Sharing, device: torch.device) -> Tensor:
    """[B, L, H] by a forward of the trunks and one of the branches; zeros in the padding. `device`: of the decoder's inputs."""
    trunk_mask = moved(sharing.trunk_mask, device)
    trunks = decoder(
        input_ids=moved(sharing.trunk_ids, device),
        attention_mask=trunk_mask,
        position_ids=_positions(trunk_mask),
        use_cache=len(sharing.parent) > 0,
    )
    pieces = [trunks.last_hidden_state.flatten(0, 1)]
    if len(sharing.parent):
        cache = trunks.past_key_values
        cache.batch_select_indices(moved(sharing.parent, device))
        branches = decoder(
            input_ids=moved(sharing.branch_ids, device),
            attention_mask=moved(sharing.branch_mask, device),
            position_ids=moved(sharing.branch_positions, device),
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(branches.last_hidden_state.flatten(0, 1))
    nothing = pieces[0].new_zeros(1, pieces[0].shape[-1])
    return torch.cat([*pieces, nothing])[moved(sharing.source, nothing.device)]


def _positions(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


# ---- the proof -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def why_not_shared(decoder: Any, longest: int, device: torch.device) -> str | None:
    """None where sharing gives the plain forward's states, else what stands against it. Two forwards of at most four rows.

    The batch has two trunks of unequal length and four ragged branches, and its longest row has `longest` tokens: windows and
    position scalings that begin within that length take part.

    Args:
        decoder: in eval mode.
        longest: tokens of the longest row that will be computed, at least `SHORTEST_PROOF`.
        device: of the decoder's inputs.
    """
    ids, mask = _proof_batch(longest, decoder.get_input_embeddings().weight.shape[0])
    sharing = plan_sharing(ids, mask, forward_cost=0)
    assert sharing is not None
    assert len(sharing.trunk_ids) < len(sharing.parent)  # a cache that stays as it is would be seen
    try:
        found = shared_states(decoder, sharing, device)
    except Exception as error:  # no cache, one of another kind, one spread over devices: all look different
        reason = " ".join(str(error).split())[:160].rstrip(". ")
        return f"its cache cannot be continued ({type(error).__name__}: {reason})"
    wanted = plain_states(decoder, ids.to(device), mask.to(device))
    own = (sharing.source >= sharing.trunk_ids.numel()) & mask.bool()
    gap = max(relative_error(found[row, own[row]], wanted[row, own[row]]) for row in range(len(ids)))
    if gap <= rounding_tolerance(wanted.dtype):
        return None
    return f"its hidden states differ by {gap:.1g} when it continues a cache"


def _proof_batch(longest: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, [4, longest], padded on the right: two rows share three quarters of it, the other two half of it."""
    trunks = (longest * 3 // 4, longest // 2)
    branches = (longest - trunks[0], max(longest // 8, 2))
    rows = []
    for number, trunk in enumerate(trunks):
        for way, branch in enumerate(branches):
            row = (
                torch.arange(trunk + branch) ** 2 * 31 + 7 * number + way * (torch.arange(trunk + branch) > trunk)
            ) % vocabulary
            row[0], row[trunk] = number, way  # trunks part at their first token, branches at theirs
            rows.append(row)
    return _padded(rows, "right")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """In the root mean square over some tokens: a wrong mask or position moves them all, a rounding error none by much."""
    wanted = wanted.double()
    return float((found.to(wanted.device).double() - wanted).norm() / wanted.norm())


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Products in half precision, or in TF32, round differently in batches of another shape."""
    exact = dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
    return 1e-4 if exact else 3e-2
