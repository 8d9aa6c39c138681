-- One signal against another on the same tokens: how far two teachers agree.
-- example: lightopd sql CACHE signal_differences
SELECT
    a.signal AS one,
    b.signal AS other,
    count(*) AS tokens,
    round(avg(a.logprob_signal - b.logprob_signal), 5) AS mean_difference,
    round(avg(abs(a.logprob_signal - b.logprob_signal)), 5) AS mean_absolute,
    round(max(abs(a.logprob_signal - b.logprob_signal))::DOUBLE, 5) AS largest,
    round(corr(a.logprob_signal, b.logprob_signal), 4) AS correlation
FROM tokens AS a
JOIN tokens AS b ON a.rollout_id = b.rollout_id AND a.pos = b.pos AND a.signal < b.signal
WHERE a.loss_mask AND a.logprob_signal IS NOT NULL AND b.logprob_signal IS NOT NULL
GROUP BY a.signal, b.signal
ORDER BY a.signal, b.signal;
