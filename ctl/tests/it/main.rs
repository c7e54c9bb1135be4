//! fermatactl against a scripted peer: exit codes, streams, formats.

mod autostart;
mod exit_codes;
mod follow;
mod output;
mod run;
mod stub;
