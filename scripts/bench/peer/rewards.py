"""The rewards of both sides."""


def even_length(response: str, answer: str) -> float:
    """Half of what an untrained model says is right by this rule, so every batch has something to learn."""
    return float(len(response) % 2 == 0)


def digits(response: str, answer: str) -> float:
    """The rule of configs/digits."""
    from mssr.rewards.rules import score

    return score("exact_match", response, answer).score
