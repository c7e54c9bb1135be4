//! `pause` and `resume`.

use std::collections::BTreeMap;
use std::io;

use fermata_protocol::agent::AgentResume;
use fermata_protocol::pause::{PauseResult, ProjectPause, ProjectResume, ResumeMethod, ResumeResult};
use fermata_protocol::{CheckpointNumber, Target};

use super::Ended;
use crate::cli::PauseArgs;
use crate::errors::Failure;
use crate::output::{Cell, Facts, Output, Paint, Table};
use crate::session::Session;
use crate::units::{duration, millis, number};

/// Runs `pause`.
pub fn pause(session: &mut Session, args: PauseArgs) -> Ended {
    let label = format!("pause {}", args.project);
    let params =
        ProjectPause { project: args.project, reason: args.reason, mode: args.mode, grace_ms: args.grace.map(millis) };
    let result = session.call_long(&label, &params)?;
    let id = Some(result.checkpoint_id.to_string());
    session.out.one(&result, id, paused)?;
    Ok(0)
}

fn paused(out: &mut Output, result: &PauseResult) -> io::Result<()> {
    let tokens = format!(
        "{} before, {} after ({:.1} % less)",
        number(result.tokens_before),
        number(result.tokens_after),
        result.reduction_percentage
    );
    let archived = format!(
        "{} items; {} hot and {} warm stay",
        result.items_archived, result.hot_items_retained, result.warm_items_retained
    );
    let facts = Facts::default()
        .add("checkpoint", result.checkpoint_id.to_string())
        .add("mode", result.mode.as_str())
        .add("mechanism", result.mechanism.as_str())
        .add("processes", result.processes.to_string())
        .add("frozen", frozen(result.frozen_ms, &result.steps_ms))
        .add("tokens", tokens)
        .add("archived", archived)
        .add("operation", result.operation_id.as_str());
    out.facts(&facts)?;
    out.warnings(&result.warnings)
}

/// Writes how long agents stood still, with the steps in brackets.
pub fn frozen(frozen_ms: f64, steps: &BTreeMap<String, f64>) -> String {
    let steps = steps_text(steps);
    if steps.is_empty() { duration(frozen_ms) } else { format!("{} ({steps})", duration(frozen_ms)) }
}

/// Writes steps with their durations.
pub fn steps_text(steps: &BTreeMap<String, f64>) -> String {
    let steps: Vec<String> = steps.iter().map(|(step, ms)| format!("{step} {}", duration(*ms))).collect();
    steps.join(", ")
}

/// Runs `resume`; exit code 1 when an agent could not be brought back.
pub fn resume(session: &mut Session, target: Target, checkpoint: Option<CheckpointNumber>, over_budget: bool) -> Ended {
    if target.agent.is_some() {
        if checkpoint.is_some() {
            return Err(Failure::usage("--checkpoint restores a whole project, and one agent is named")
                .hint(format!("fermatactl checkpoint restore {} N", target.project)));
        }
        if over_budget {
            return Err(Failure::usage("--over-budget lets a whole project go on, and one agent is named"));
        }
        return bring_back(session, target);
    }
    let project = target.project;
    let label = format!("resume {project}");
    let params = ProjectResume { project, checkpoint, over_budget };
    let result = session.call_long(&label, &params)?;
    let id = Some(result.operation_id.to_string());
    session.out.one(&result, id, resumed)?;
    Ok(if result.success { 0 } else { 1 })
}

/// Brings back one agent that has ended.
fn bring_back(session: &mut Session, target: Target) -> Ended {
    let agent = session.call(&AgentResume { target: target.clone() })?;
    session.out.one(&agent, Some(target.to_string()), |out, agent| match agent.pid {
        Some(pid) => out.line(format_args!("{target} is back, pid {pid}")),
        None => out.line(format_args!("{target} is {}", agent.status)),
    })?;
    Ok(0)
}

fn resumed(out: &mut Output, result: &ResumeResult) -> io::Result<()> {
    let restored = result.restored.map(|n| format!("checkpoint {n}"));
    let facts = Facts::default()
        .maybe("restored", restored)
        .add("was paused for", duration(result.paused_ms as f64))
        .add("operation", result.operation_id.as_str());
    out.facts(&facts)?;
    if !result.agents.is_empty() {
        out.line("")?;
        let mut table = Table::new(&["AGENT", "RESUMED", "DETAIL"]);
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
