//! fermatactl against a scripted daemon: exit codes, streams, formats.

mod autostart;
mod exit_codes;
mod follow;
mod output;
mod run;
mod stub;
