"""What the coordinator's and the sites' pages share: serving over loopback or TLS, headers, live updates, the look.

Knows nothing of runs or sites. Everything a page needs is served from the installed packages; nothing is fetched from
elsewhere, and no script stands in the pages.
"""
