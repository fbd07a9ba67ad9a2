"""The checks: functions of plain values, so that tests can describe any machine."""
