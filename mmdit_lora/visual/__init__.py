"""Drawing boxes, contact sheets, charts and pages."""
