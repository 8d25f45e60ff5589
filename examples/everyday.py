"""Write a file of conflicts: forty everyday facts of four kinds, each contradicted in four phrasings, and asked bare.

    python examples/everyday.py > mine.jsonl

Two hundred lines, as somebody may write them who tries this for the first time.
"""

import json

# What is asked, and the answers a model has by heart.
FACTS = {
    "The capital of {} is": {
        "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Russia": "Moscow", "Egypt": "Cairo",
        "Greece": "Athens", "Spain": "Madrid", "Germany": "Berlin", "China": "Beijing", "Portugal": "Lisbon",
    },
    "The day after {} is": {
        "Monday": "Tuesday", "Tuesday": "Wednesday", "Wednesday": "Thursday", "Thursday": "Friday",
        "Friday": "Saturday", "Saturday": "Sunday", "Sunday": "Monday",
    },
    "The opposite of {} is": {
        "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "good": "bad",
        "fast": "slow", "rich": "poor", "strong": "weak", "long": "short", "black": "white", "old": "new",
    },
    "The language spoken in {} is": {
        "Brazil": "Portuguese", "Mexico": "Spanish", "Poland": "Polish", "Sweden": "Swedish", "Turkey": "Turkish",
        "Austria": "German", "Hungary": "Hungarian", "Thailand": "Thai", "Finland": "Finnish", "Iran": "Persian",
        "Denmark": "Danish",
    },
}  # fmt: skip
STEP = 3  # what is said of a thing is true of the third one after it
PHRASINGS = (
    "Context: {said}.\nQuestion: {asked} what?\nAnswer: {asked}",
    "Passage: {said}.\nQuestion: {asked} what?\nAnswer: {asked}",
    "They say: {said}. {asked}",
    "I read this: {said}. {asked}",
)


def lines() -> list[dict[str, str]]:
    """The lines of the file."""
    found = []
    for relation, answers in FACTS.items():
        things = list(answers)
        for number, (thing, true) in enumerate(answers.items()):
            asked, said = relation.format(thing), answers[things[(number + STEP) % len(things)]]
            item = {"item": asked, "group": asked}
            flips = {"memorized": f" {true}", "generalized": f" {said}", "bare": asked}
            prompts = (phrasing.format(asked=asked, said=f"{asked} {said}") for phrasing in PHRASINGS)
            found += [item | {"prompt": prompt} | flips for prompt in prompts]
            found.append(item | {"kind": "memory", "prompt": asked, "answer": f" {true}"})
    return found


if __name__ == "__main__":
    for line in lines():
        print(json.dumps(line))
