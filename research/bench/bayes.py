"""Naive Bayes on words and on pairs of words: what a classifier of texts has to beat.

Multinomial naive Bayes (McCallum and Nigam 1998) with add-one smoothing. A feature is a word, or a
pair of words that follow one another, counted; nothing is tuned.
"""

from collections.abc import Mapping

from research.data.text import LabelledText

NGRAMS = {"words": 1, "words and pairs": 2}


def accuracies(source: LabelledText) -> dict[str, dict[str, float]]:
    """By features and by split: the share of rows that are classified rightly.

    A row is read whole, with every word that training has: `length`, `vocab` and `min_count` are
    limits of a network. Bad rows that are skipped count nowhere.
    """
    found = {
        name: [(text, label) for text, label in rows if label is not None]
        for name, rows in source.rows(source.bad()).items()
    }
    return {name: _accuracies(found, source.lower, n) for name, n in NGRAMS.items()}


def _accuracies(
    rows: Mapping[str, list[tuple[str, int]]], lower: bool, longest: int
) -> dict[str, float]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    counter = CountVectorizer(token_pattern=r"\S+", lowercase=lower, ngram_range=(1, longest))
    texts, labels = zip(*rows["train"], strict=True)
    model = MultinomialNB().fit(counter.fit_transform(texts), labels)
    return {
        name: float(model.score(counter.transform([t for t, _ in part]), [c for _, c in part]))
        for name, part in rows.items()
        if name != "train"
    }
