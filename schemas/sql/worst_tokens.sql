-- The 50 trained tokens that the student finds much likelier than the signal does: where it has most to unlearn.
SELECT
    signal,
    rollout_id,
    pos,
    token_id,
    round(logprob_student::DOUBLE, 4) AS logprob_student,
    round(logprob_signal::DOUBLE, 4) AS logprob_signal,
    round(gap::DOUBLE, 4) AS gap,
    reward,
    truncated
FROM tokens
WHERE is_trained AND gap IS NOT NULL
ORDER BY tokens.gap DESC, rollout_id, pos
LIMIT 50;
