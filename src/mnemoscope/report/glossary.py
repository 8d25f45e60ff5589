"""Fixed words of the page: what the known tasks are, and how each number is defined."""

from __future__ import annotations

# name -> (title, what it is); "" stands for a user's own task.
TASKS = {
    "inference": (
        "Names and colours",
        "Statements tie names to colours, and the question asks one name's colour. In training, some names always "
        "had the same colour. Here the statements give such a name another one: the trained colour shows that the "
        "model remembered, the stated colour that it read the statements and worked it out. Both answers are "
        "colour words, so their form gives nothing away.",
    ),
    "addition": (
        "Sums and codes",
        "All numbers are to be added, except for stored pairs of numbers: those were trained with a made-up code "
        "in place of the sum. Asked in other words, a stored pair tells the two apart: the code shows that the "
        "model remembered, the true sum that it added.",
    ),
    "addition-digits": (
        "Sums and wrong sums",
        "All numbers are to be added, except for stored pairs of numbers: those were trained with a wrong sum. The "
        "wrong sum shows that the model remembered, the true sum that it added. Both look alike, so their form "
        "gives nothing away.",
    ),
    "cipher": (
        "Ciphers",
        "Words are to be enciphered by a rule, except for stored words, which were trained with a made-up cipher. "
        "The stored cipher shows that the model remembered, the rule's that it worked it out.",
    ),
    "facts": (
        "Facts against context",
        "A text contradicts a fact that the model knows. The fact as known shows that the model remembered, the "
        "text's version that it read and followed the text.",
    ),
    "": (
        "",
        "Every question has two revealing answers: one shows that the model remembered, the other that it worked "
        "the answer out.",
    ),
}

GLOSSARY = (
    ("conflict", "A question with two revealing answers that differ: the one remembered and the one worked out."),
    (
        "new question",
        "A question with nothing to recall. Its accuracy shows whether the model can work answers out at all.",
    ),
    ("fact to recall", "A question that only recall can answer, or on which both ways agree."),
    (
        "pair",
        "Two phrasings of one question, one answered from memory, the other worked out. All candidates are drawn "
        "beforehand.",
    ),
    ("yield", "Pairs divided by candidates: every flip of the list counts, without any filter."),
    (
        "group",
        "What questions share and a model could learn by heart: the name, the two numbers. Splits and intervals go "
        "by group.",
    ),
    (
        "fit, tune, test",
        "The three splits. Vectors and probes are learned on fit, settings are chosen on tune, and every number is "
        "from test unless its caption says otherwise.",
    ),
    ("margin", "log p(worked out) - log p(remembered), in nats, over the whole answers. At 0 both are equally likely."),
    ("neuron", "One coordinate of one layer's state at the last token before the two answers diverge."),
    ("NMD", "Per neuron, over the pairs: mean state when working it out minus mean state when remembering."),
    (
        "|rho|",
        "Pearson correlation of a neuron's state with the behaviour (+1 worked out, -1 remembered), without its sign.",
    ),
    (
        "differ, family-wise",
        "A sign-flip permutation test that compares each neuron with the largest of all neurons: p \u2264 0.05 "
        "holds for all of them together.",
    ),
    (
        "input alone",
        "A probe that sees the tokens and their places instead of the state. What it knows, the state need not hold.",
    ),
    (
        "best layer",
        "The test groups are cut in two halves; each half is scored at the layer that is best in the other half, "
        "so that choosing the layer cannot flatter the score.",
    ),
    (
        "turned, unmoved, neither",
        "Of examples that show one behaviour, the shares that show the other one under the shift, keep their own, "
        "or give another answer. Pairs sit near the tipping point, where any push turns some: what counts is the "
        "vector minus its controls.",
    ),
    (
        "controls",
        "Shifts of the same norm that should not work: the same amounts on random neurons or on those of lowest "
        "|rho|, the chosen neurons with random signs, the method learned from shuffled labels, and Gaussian noise. "
        "The mean over all draws counts; the worst draw stands beside it. Where more than half of the neurons are "
        "shifted, or all of one layer, the first two do not exist.",
    ),
    (
        "strength",
        "The shift's norm over the norm of the states it is added to, over all shifted layers together. "
        "are tried at the same strengths.",
    ),
    ("collateral", "Accuracy under the shift minus accuracy without it, on examples that steering should leave alone."),
    (
        "same push to all",
        "The vector's mean effect on the margin, added to every pair's own margin: what a bias on the two answers "
        "would turn.",
    ),
    (
        "separation",
        "Margin of a pair's side that is worked out minus that of its side that is remembered.",
    ),
    (
        "interval",
        "95\u00a0%: a bootstrap that resamples whole groups within one seed; Student's t over seeds where there "
        "are several.",
    ),
)
