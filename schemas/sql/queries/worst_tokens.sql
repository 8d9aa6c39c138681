-- The trained tokens that the student finds much likelier than the signal does: where it has most to unlearn.
-- k = 50: how many
-- context = 12: tokens of text shown before each
-- signal = null: one signal, all when null
-- example: lightopd sql CACHE worst_tokens k=10
SELECT
    w.signal,
    w.rollout_id,
    w.pos,
    w.token_id,
    decode(r.response_ids[greatest(w.pos - $context + 1, 1):w.pos]) AS before,
    token(w.token_id) AS token,
    round(w.logprob_student::DOUBLE, 4) AS logprob_student,
    round(w.logprob_signal::DOUBLE, 4) AS logprob_signal,
    round(w.gap::DOUBLE, 4) AS gap,
    w.reward,
    w.truncated
FROM (
    SELECT * FROM tokens
    WHERE loss_mask AND gap IS NOT NULL AND ($signal IS NULL OR signal = $signal)
    ORDER BY gap DESC, rollout_id, pos
    LIMIT $k
) AS w
JOIN rollouts AS r USING (rollout_id)
ORDER BY w.gap DESC, w.rollout_id, w.pos;
