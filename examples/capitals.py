"""Write a file of conflicts: capitals that a model knows, contradicted in the prompt, in six phrasings each.

    python examples/capitals.py > mine.jsonl

Every line is one prompt; docs/your-data.md says what the fields mean. The bare questions at the end are what steering
should leave alone.
"""

import json

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen",
    "Finland": "Helsinki", "Ireland": "Dublin", "Belgium": "Brussels", "Turkey": "Ankara", "Iran": "Tehran",
    "Iraq": "Baghdad", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cuba": "Havana", "Peru": "Lima",
    "Canada": "Ottawa", "Kenya": "Nairobi", "Nigeria": "Abuja", "Morocco": "Rabat", "Indonesia": "Jakarta",
    "Ukraine": "Kyiv", "Romania": "Bucharest", "Bulgaria": "Sofia", "Serbia": "Belgrade", "Croatia": "Zagreb",
    "Lebanon": "Beirut", "Syria": "Damascus", "Jordan": "Amman", "Nepal": "Kathmandu", "Australia": "Canberra",
    "Venezuela": "Caracas", "Colombia": "Bogota", "Jamaica": "Kingston", "Ghana": "Accra", "Senegal": "Dakar",
    "Uganda": "Kampala", "Zimbabwe": "Harare", "Libya": "Tripoli", "Sudan": "Khartoum",
}  # fmt: skip
ASK = "Question: What is the capital of {country}?\nAnswer: The capital of {country} is"
# Within a family only the label or the first words differ: pairs are sought there.
LABELS, STARTS = ("Context", "Rumour", "Hint"), ("They say", "I read that", "Once")
FAMILIES = {
    "labelled": [f"{label}: The capital of {{country}} is {{said}}.\n{ASK}" for label in LABELS],
    "reported": [f"{start} the capital of {{country}} is {{said}}. {ASK}" for start in STARTS],
}


def lines() -> list[dict[str, str]]:
    """The lines of the file."""
    countries, found = list(CAPITALS), []
    for number, country in enumerate(countries):
        bare = ASK.format(country=country)
        said = CAPITALS[countries[(number + 7) % len(countries)]]
        for family, phrasings in FAMILIES.items():
            for phrasing in phrasings:
                prompt = phrasing.format(country=country, said=said)
                answers = {"memorized": f" {CAPITALS[country]}", "generalized": f" {said}"}
                item = {"item": f"{country}, said to be {said}", "group": country, "family": family}
                found.append(item | {"prompt": prompt, **answers, "bare": bare})
        found.append(
            {"item": country, "group": country, "kind": "memory", "prompt": bare, "answer": f" {CAPITALS[country]}"}
        )
    return found


if __name__ == "__main__":
    for line in lines():
        print(json.dumps(line))
