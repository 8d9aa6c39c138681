"""What a scoring model is shown instead of the student's own prompt, as Jinja templates by name.

Variables: `prompt` (text of the last user turn), `answer`, `domain`, and every further column of the prompts
file, such as `solution`. The response that follows is the student's, token for token.
"""

SHIPPED_TEMPLATES = {
    # OPSD, arXiv 2601.18734, section 3: the teacher is the same model shown the reference solution.
    "privileged": "{{ prompt }}\n\nHere is a reference solution to this problem:\n{{ solution }}\n\n"
    "After understanding the reference solution, please answer the problem in your own words.",
    "answer": "{{ prompt }}\n\nThe final answer is {{ answer }}.",
    "hint": "{{ prompt }}\n\nHint: {{ hint }}",
    "state": "{{ state }}\n\n{{ prompt }}",
    "evidence": "{{ prompt }}\n\nEvidence:\n{{ evidence }}",
}
"""Templates that a config can name."""
