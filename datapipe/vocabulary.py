"""Two tokenizers side by side: whether a model of one can take the other, and what its new tokens are made of."""

from __future__ import annotations

from datapipe.tokenizer import USUAL_TOKENS, Tokenizer


def first_difference(trained: Tokenizer, chosen: Tokenizer) -> str | None:
    """Describe the first token or role in which two tokenizers disagree; None if a model of one can take the other.

    Tokens that `chosen` has besides those of `trained` are no disagreement.
    """
    trained_ids, chosen_ids = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (trained, chosen))
    for token, token_id in sorted(trained_ids.items(), key=lambda item: item[1]):
        if chosen_ids.get(token) != token_id:
            return f"{token!r} is id {token_id} there and {chosen_ids.get(token, 'absent')} here"
    for role in USUAL_TOKENS:
        ids = [getattr(tokenizer, f"{role}_id") for tokenizer in (trained, chosen)]
        if ids[0] != ids[1]:
            return f"the {role} token is id {ids[0]} there and {ids[1]} here"
    return None


def pieces_of_new_tokens(trained: Tokenizer, chosen: Tokenizer) -> dict[int, list[int]]:
    """Split the text of each token that only `chosen` has into ids of `trained`.

    Args:
        trained: The tokenizer that the model was trained with.
        chosen: One that extends it.

    Returns:
        Ids of the pieces by id of the new token, ascending.
    """
    old, new = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (trained, chosen))
    added = sorted((token_id, token) for token, token_id in new.items() if token not in old)
    texts = [chosen.token_bytes[token_id].decode(errors="replace") or token for token_id, token in added]
    pieces = trained.encode(texts)
    return {token_id: ids.tolist() for (token_id, _), ids in zip(added, pieces, strict=True)}
