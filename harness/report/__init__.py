"""Rows become tables (`points`, `summary`), sentences (`findings`), plots (`plots`) and the report (`build`,
`render`)."""
