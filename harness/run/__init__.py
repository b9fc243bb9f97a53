"""Where a point is run: the parent (`runner`, `local` or `ray`, `supervise`) and the child process (`trial`,
`guard`).
"""
