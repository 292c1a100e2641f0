"""One scheduled run: what is new, is it worth a challenger, is that better, who is champion."""
