-- Share of the most likely tokens that two signals have in common at a trained token, with the probability that each gives them, for all and by quarter of the response.
-- k = 64: most likely tokens of each that are compared
-- example: lightopd sql CACHE overlap k=4
WITH entries AS (
        SELECT t.rollout_id, t.signal, t.pos, t.token_id, exp(t.logprob::DOUBLE) AS p,
               1 + (4 * t.pos) // len(r.loss_mask) AS quarter
        FROM topk AS t JOIN raw_rollouts AS r USING (rollout_id)
        WHERE t.rank <= $k AND r.loss_mask[t.pos + 1]
     ),
     counts AS (SELECT rollout_id, signal, pos, quarter, count(*) AS entries FROM entries GROUP BY ALL),
     common AS (
        SELECT a.rollout_id, a.pos, a.signal AS one, b.signal AS other, count(*) AS shared,
               sum(a.p) AS mass_one, sum(b.p) AS mass_other
        FROM entries AS a
        JOIN entries AS b USING (rollout_id, pos, token_id)
        WHERE a.signal < b.signal
        GROUP BY ALL
     ),
     places AS (
        SELECT a.signal AS one, b.signal AS other, a.quarter,
               coalesce(c.shared, 0) / least(a.entries, b.entries) AS share,
               coalesce(c.mass_one, 0) AS mass_one, coalesce(c.mass_other, 0) AS mass_other
        FROM counts AS a
        JOIN counts AS b ON a.rollout_id = b.rollout_id AND a.pos = b.pos AND a.signal < b.signal
        LEFT JOIN common AS c
            ON c.rollout_id = a.rollout_id AND c.pos = a.pos AND c.one = a.signal AND c.other = b.signal
     )
SELECT
    one,
    other,
    coalesce(places.quarter::VARCHAR, 'all') AS quarter,
    count(*) AS positions,
    round(avg(share), 4) AS mean_overlap,
    round(avg(mass_one), 4) AS mass_one,
    round(avg(mass_other), 4) AS mass_other,
    round(quantile_cont(share, 0.25), 4) AS p25_overlap,
    round(quantile_cont(share, 0.5), 4) AS p50_overlap,
    round(quantile_cont(share, 0.75), 4) AS p75_overlap
FROM places
GROUP BY GROUPING SETS ((one, other), (one, other, quarter))
ORDER BY one, other, places.quarter NULLS FIRST;
