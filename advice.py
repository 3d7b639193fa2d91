"""Advice: what to try when a run shows one of its usual troubles, said on the console.

A trouble is told once, when it has lasted for STEPS steps; again only if it was away for as many.
"""

STEPS = 5


def advice(rows: list[dict]) -> str | None:
    """The troubles that began with the last of these rows of metrics and what to try, two lines
    each; None if there are none.

    rows: one or more of the run's latest, in order; a hundred are enough. A row may lack any key.
    """
    found = [f"step {rows[-1]['step']}, for {STEPS} steps now: {name}\n  "
             + (mend if isinstance(mend, str) else mend(rows[-STEPS:]))
             for name, trouble, mend in TROUBLES if begins([trouble(row) for row in rows])]
    return "\n".join(found) or None


def begins(troubled: list[bool]) -> bool:
    """True if the last STEPS are the first STEPS True in a row since STEPS False in a row."""
    told = now = False
    for end in range(STEPS, len(troubled) + 1):
        latest = troubled[end - STEPS : end]
        now = all(latest) and not told
        told = (told or now) and any(latest)
    return now


def value(row: dict, key: str) -> float:
    """A metric, NaN where it is missing or null: no comparison with that is true."""
    return float("nan") if row.get(key) is None else row[key]


def perfect(row: dict) -> bool:
    """Whether every reward is near 1, the most that one gives."""
    return all(value(row, key) >= 0.95 for key in row if key.startswith("reward/"))


def without_signal(rows: list[dict]) -> str:
    """What to try when all completions of a prompt get the same reward."""
    def always(key: str, wanted: float) -> bool:
        return all(value(row, key) == wanted for row in rows)

    if always("no_reward", 1):
        return "No reward function gives a number: do they raise, do they understand the solutions?"
    if always("reward/format", 0):
        return ("The model never answers in the form that is asked for. Start from one that does: "
                "sft.py on completions that think and answer (distill.py makes them).")
    if always("reward/accuracy", 1):
        return "It answers everything: the data is too easy. Take harder rows."
    return ("rollouts.jsonl shows what it says. Try a larger --group, a higher --temperature, "
            "easier rows, or --dynamic_sampling 2.")


TROUBLES = (  # what it is called, whether a row has it, what to try: a text, or a function of rows
    ("no group had any signal, nothing is learnt",
     lambda row: value(row, "no_signal") == 1, without_signal),
    ("more than half of the completions are cut off, mostly before they answer",
     lambda row: value(row, "truncated") > 0.5,
     "Try a larger --max_new; if they repeat themselves, a lower --temperature."),
    ("the sampler's log-probs are not the trainer's (mismatch above 1.02)",
     lambda row: value(row, "mismatch") > 1.02,
     "What is learnt is not what was sampled. Try --bf16 false; if it stays, the "
     "sampler or the model has a bug."),
    ("hardly any entropy is left, and the rewards are not at their top",
     lambda row: value(row, "entropy") < 0.02 and not perfect(row),
     "It no longer explores. Go back to an earlier checkpoint with a smaller --lr, a "
     "larger --clip_high (0.28) or --beta, or a higher --temperature."),
    ("more than 10 % of the completions have no reward because computing it was killed",
     lambda row: value(row, "reward_killed") > 0.1,
     "It takes too long or too much memory. Mend the function, lower --max_new, or, "
     "for one of your own, raise --reward_seconds and --reward_memory."),
)  # fmt: skip
