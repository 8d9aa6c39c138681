-- At the tokens with the largest gap: what the student wrote, and what the signal finds most likely there.
-- k = 20: how many
-- context = 12: tokens of text shown before each
-- signal = null: one signal, all when null
-- example: lightopd sql CACHE teacher_instead k=5
WITH worst AS (
    SELECT * FROM tokens
    WHERE loss_mask AND gap IS NOT NULL AND ($signal IS NULL OR signal = $signal)
    ORDER BY gap DESC, rollout_id, pos
    LIMIT $k
)
SELECT
    w.signal,
    w.rollout_id,
    w.pos,
    decode(r.response_ids[greatest(w.pos - $context + 1, 1):w.pos]) AS before,
    token(w.token_id) AS student_wrote,
    round(exp(w.logprob_student::DOUBLE), 4) AS student_probability,
    round(exp(w.logprob_signal::DOUBLE), 4) AS signal_probability,
    token(t.token_id) AS signal_prefers,
    round(exp(t.logprob::DOUBLE), 4) AS its_probability
FROM worst AS w
JOIN rollouts AS r USING (rollout_id)
LEFT JOIN (
    SELECT * FROM topk WHERE rank = 1 AND rollout_id IN (SELECT rollout_id FROM worst)
) AS t ON t.rollout_id = w.rollout_id AND t.signal = w.signal AND t.pos = w.pos
ORDER BY w.gap DESC, w.rollout_id, w.pos;
