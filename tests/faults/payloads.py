"""Text that a page would obey if it were not escaped: `window.pwned` tells that it did."""

PAYLOADS = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "</title></style></textarea><img src=x onerror=window.pwned=1>",
    "\"'><svg onload=window.pwned=1>",
    "' onmouseover='window.pwned=1' autofocus onfocus='window.pwned=1",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "<a href='javascript:window.pwned=1'>x</a>[x](javascript:window.pwned=1)",
    "<!-- ]]> --!> <![CDATA[ \u2028 {{7*7}} ${7*7} {% raw %}",
    "<img src=http://evil.example/x><link rel=stylesheet href=//evil.example/y>",
    "&lt;script&gt;window.pwned=1&lt;/script&gt;",
)
ALL = " ".join(PAYLOADS)
