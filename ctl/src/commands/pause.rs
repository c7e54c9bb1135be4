//! `pause` and `resume`.

use std::collections::BTreeMap;
use std::io;

use fermata_protocol::agent::AgentResume;
use fermata_protocol::pause::{PauseResult, ProjectPause, ProjectResume, ResumeMethod, ResumeResult};
use fermata_protocol::{CheckpointNumber, Target};

use crate::cli::PauseArgs;
use crate::errors::{CommandError, CommandResult};
use crate::output::{Cell, FieldList, Paint, Printer, TextTable};
use crate::session::DaemonSession;
use crate::units::{counted, duration, millis, number};

pub fn pause(session: &mut DaemonSession, args: PauseArgs) -> CommandResult {
    let label = format!("pause {}", args.project);
    let params =
        ProjectPause { project: args.project, reason: args.reason, mode: args.mode, grace_ms: args.grace.map(millis) };
    let result = session.call_long(&label, &params)?;
    let id = Some(result.checkpoint_id.to_string());
    session.out.object(&result, id, print_pause)?;
    Ok(0)
}

fn print_pause(out: &mut Printer, result: &PauseResult) -> io::Result<()> {
    let tokens = format!(
        "{} -> {} ({:.1}% reduction)",
        number(result.tokens_before),
        number(result.tokens_after),
        result.reduction_percentage
    );
    let archived = format!(
        "{} ({} hot and {} warm kept)",
        counted(result.items_archived, "item"),
        result.hot_items_retained,
        result.warm_items_retained
    );
    let fields = FieldList::default()
        .add("checkpoint", result.checkpoint_id.to_string())
        .add("mode", result.mode.as_str())
        .add("mechanism", result.mechanism.as_str())
        .add("processes", result.processes.to_string())
        .add_some("frozen before commit", frozen_time(result.frozen_ms))
        .add_some("steps", steps_text(&result.steps_ms))
        .add("context tokens", tokens)
        .add("archived", archived)
        .add("operation", result.operation_id.as_str());
    out.fields(&fields)?;
    out.warnings(&result.warnings)
}

/// Formats how long agents were frozen; `None` when they were not.
pub fn frozen_time(frozen_ms: f64) -> Option<String> {
    (frozen_ms > 0.0).then(|| duration(frozen_ms))
}

/// Formats the steps of an operation with their durations; `None` when there are none.
pub fn steps_text(steps: &BTreeMap<String, f64>) -> Option<String> {
    let steps: Vec<String> = steps.iter().map(|(step, ms)| format!("{step} {}", duration(*ms))).collect();
    (!steps.is_empty()).then(|| steps.join(", "))
}

/// Resumes a project or an agent; exit code 1 when an agent of the project could not be resumed.
pub fn resume(
    session: &mut DaemonSession,
    target: Target,
    checkpoint: Option<CheckpointNumber>,
    over_budget: bool,
) -> CommandResult {
    if target.agent.is_some() {
        if checkpoint.is_some() {
            return Err(CommandError::usage("--checkpoint applies to a project, not to one agent")
                .hint(format!("fermatactl checkpoint restore {} N", target.project)));
        }
        if over_budget {
            return Err(CommandError::usage("--over-budget applies to a project, not to one agent"));
        }
        return resume_agent(session, target);
    }
    let project = target.project;
    let label = format!("resume {project}");
    let params = ProjectResume { project, checkpoint, over_budget };
    let result = session.call_long(&label, &params)?;
    let id = Some(result.operation_id.to_string());
    session.out.object(&result, id, print_resume)?;
    Ok(if result.success { 0 } else { 1 })
}

fn resume_agent(session: &mut DaemonSession, target: Target) -> CommandResult {
    let agent = session.call(&AgentResume { target: target.clone() })?;
    session.out.object(&agent, Some(target.to_string()), |out, agent| match agent.pid {
        Some(pid) => out.line(format_args!("{target} resumed, pid {pid}")),
        None => out.line(format_args!("{target} is {}", agent.status)),
    })?;
    Ok(0)
}

fn print_resume(out: &mut Printer, result: &ResumeResult) -> io::Result<()> {
    let restored = result.restored.map(|n| format!("checkpoint {n}"));
    let fields = FieldList::default()
        .add_some("restored", restored)
        .add("paused for", duration(result.paused_ms as f64))
        .add("operation", result.operation_id.as_str());
    out.fields(&fields)?;
    if !result.agents.is_empty() {
        out.line("")?;
        let mut table = TextTable::new(&["AGENT", "METHOD", "DETAIL"]);
        for agent in &result.agents {
            let (rung, paint) = match agent.method {
                ResumeMethod::Thawed => ("thawed", Paint::Good),
                ResumeMethod::ImageRestored => ("image restored", Paint::Good),
                ResumeMethod::Respawned => ("respawned", Paint::Attention),
                ResumeMethod::Failed => ("failed", Paint::Bad),
            };
            let argv = agent.argv.as_ref().map(|argv| argv.join(" "));
            let detail: Vec<String> = agent.detail.clone().into_iter().chain(argv).collect();
            table.row([Cell::from(agent.agent.as_str()), Cell::painted(rung, paint), detail.join(": ").into()]);
        }
        out.table(&table)?;
    }
    out.warnings(&result.warnings)
}
