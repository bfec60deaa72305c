"""`aepo report RUN [RUN ...]`: one self-contained HTML page out of the files of a run directory.

    run.json, config.yaml, metrics.jsonl, evals.jsonl, trees/, answers/  ->  Run  ->  JSON  ->  templates/report.html.j2

Unfinished runs are reported as they are. What is missing is shown as missing; what cannot be read is listed on the
page. Text that a model or a tool wrote is untrusted: it reaches the page only escaped.

The charts are SVG code of our own (templates/charts.js) instead of plotly: plotly's script alone is 4.8 MB, the whole
page of a 60-step run is 0.3 MB.
"""

from aepo.report.live import serve_report
from aepo.report.page import write_report, write_rollout_page

__all__ = ["serve_report", "write_report", "write_rollout_page"]
