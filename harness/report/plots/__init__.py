"""The plots of a report. matplotlib is imported here only; others draw through `style`."""
