"""The names of the files in a run directory, for what writes them and what reads them."""

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CONFIG_FILE = ".hydra/config.yaml"
