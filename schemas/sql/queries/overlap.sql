-- Share of one signal's stored tokens that another's hold too, position by position: low overlap makes a top-k loss blind.
-- k = 8: entries of each that are compared
-- example: lightopd sql CACHE overlap k=4
WITH entries AS (SELECT * FROM topk WHERE rank <= $k),
     counts AS (SELECT rollout_id, signal, pos, count(*) AS entries FROM entries GROUP BY ALL),
     common AS (
        SELECT a.rollout_id, a.pos, a.signal AS one, b.signal AS other, count(*) AS shared
        FROM entries AS a
        JOIN entries AS b USING (rollout_id, pos, token_id)
        WHERE a.signal < b.signal
        GROUP BY ALL
     )
SELECT
    a.signal AS one,
    b.signal AS other,
    count(*) AS positions,
    round(avg(coalesce(shared, 0) / least(a.entries, b.entries)), 4) AS mean_overlap,
    round(quantile_cont(coalesce(shared, 0) / least(a.entries, b.entries), 0.1), 4) AS p10_overlap
FROM counts AS a
JOIN counts AS b ON a.rollout_id = b.rollout_id AND a.pos = b.pos AND a.signal < b.signal
LEFT JOIN common AS c
    ON c.rollout_id = a.rollout_id AND c.pos = a.pos AND c.one = a.signal AND c.other = b.signal
GROUP BY a.signal, b.signal
ORDER BY a.signal, b.signal;
