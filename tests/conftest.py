"""A browser for the tests that need one."""

from page.browsing import browser as browser
