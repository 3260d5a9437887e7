"""Human evaluation: people rate the outputs of one system, or compare those of two, without knowing whose they are.

python -m minivlm.human sheet --a one.jsonl --b other.jsonl --images DIR --out sheet.html      (sheet.py)
python -m minivlm.human results ratings-anna.json ratings-ben.json                             (results.py)
"""
