"""Scores of generated texts against one or several references, by rouge-score and sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def measure(texts: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[str]) -> dict[str, float]:
    """The scores in `wanted`: ROUGE's F1 and exact_match from 0 to 1, bleu and chrf from 0 to 100.

    Of several references a text's best counts; BLEU and chrF take them together.
    """
    found: dict[str, float] = {}
    if "rouge" in wanted:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        # The best for each kind of ROUGE, by F1.
        scores = [scorer.score_multi(list(given), text) for text, given in zip(texts, references, strict=True)]
        found |= {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    if "bleu" in wanted or "chrf" in wanted:
        from sacrebleu.metrics import BLEU, CHRF

        most = max(len(given) for given in references)
        # sacrebleu wants the first reference of every text, then the second …; None where a text has fewer.
        columns = [[given[i] if i < len(given) else None for given in references] for i in range(most)]
        if "bleu" in wanted:
            found["bleu"] = float(BLEU().corpus_score(list(texts), columns).score)
        if "chrf" in wanted:
            found["chrf"] = float(CHRF().corpus_score(list(texts), columns).score)
    if "exact_match" in wanted:
        hits = [text in [one.strip() for one in given] for text, given in zip(texts, references, strict=True)]
        found["exact_match"] = sum(hits) / len(hits)
    return found
