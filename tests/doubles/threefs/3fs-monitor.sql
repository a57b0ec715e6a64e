-- DOUBLE of the schema that ships with 3FS: the names of its tables.
CREATE DATABASE IF NOT EXISTS 3fs;
CREATE TABLE IF NOT EXISTS 3fs.counters (`TIMESTAMP` DateTime, `metricName` String, `val` Int64) ENGINE = MergeTree ORDER BY `TIMESTAMP`;
CREATE TABLE IF NOT EXISTS 3fs.distributions (`TIMESTAMP` DateTime, `metricName` String, `p99` Float64) ENGINE = MergeTree ORDER BY `TIMESTAMP`;
