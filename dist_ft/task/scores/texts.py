"""Metrics of generated texts against one or more references, by rouge-score and sacrebleu."""

from __future__ import annotations

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def measure(texts: Sequence[str], references: Sequence[Sequence[str]], wanted: Sequence[str]) -> dict[str, float]:
    """Compute the requested metrics of generated texts.

    Args:
        texts: Generated texts.
        references: References of each text. ROUGE and exact_match use the best score over the references of a text,
            whereas BLEU and chrF are computed against all of them.
        wanted: Metrics to compute: `rouge`, `bleu`, `chrf`, `exact_match`.

    Returns:
        F1 of `rouge1`, `rouge2` and `rougeL`, and `exact_match`, from 0 to 1; `bleu` and `chrf`, from 0 to 100.
    """
    found: dict[str, float] = {}
    if "rouge" in wanted:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(ROUGE))
        # score_multi takes the best reference by F1, separately for each kind of ROUGE.
        scores = [scorer.score_multi(list(given), text) for text, given in zip(texts, references, strict=True)]
        found |= {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
    if "bleu" in wanted or "chrf" in wanted:
        from sacrebleu.metrics import BLEU, CHRF

        most = max(len(given) for given in references)
        # sacrebleu takes the first references of all texts, then the second ones, with None for missing references.
        columns = [[given[i] if i < len(given) else None for given in references] for i in range(most)]
        if "bleu" in wanted:
            found["bleu"] = float(BLEU().corpus_score(list(texts), columns).score)
        if "chrf" in wanted:
            found["chrf"] = float(CHRF().corpus_score(list(texts), columns).score)
    if "exact_match" in wanted:
        hits = [text in [one.strip() for one in given] for text, given in zip(texts, references, strict=True)]
        found["exact_match"] = sum(hits) / len(hits)
    return found
